"""Both training modes of the contract, and a source mask made by hand, on a small random model.

Runs on a CPU in under a minute: python sft_example.py
"""

import torch

from unmask import Qwen3DiffusionConfig, Qwen3ForCausalLM, SFTDataCollator, byte_tokenizer


def main() -> None:
    """Show pretrain mode, SFT with automatic masks, SFT with a custom mask, and the error without one."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = Qwen3ForCausalLM(
        Qwen3DiffusionConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            mask_token_id=tokenizer.mask_token_id,  # pyright: ignore[reportArgumentType]
        )
    )
    model.train()

    records = [
        {"instruction": "Say hello.", "output": "Hello!"},
        {"instruction": "What is the capital of France?", "output": "Paris."},
    ]
    batch = SFTDataCollator(tokenizer)(records)
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    batch_size, seq_len = input_ids.shape
    print(f"batch: {batch_size} sequences of {seq_len} tokens")
    print(f"instruction lengths found by the collator: {batch['instruction_lengths'].tolist()}")

    print("\n1. pretrain: any token can be masked")
    logits, loss = model(input_ids=input_ids, attention_mask=attention_mask)
    print(f"   logits {tuple(logits.shape)}, loss {loss.item():.3f} nats per supervised token")

    print("\n2. sft: the collator's src_mask keeps the instructions whole")
    logits, loss = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        src_mask=batch["src_mask"],
        training_mode="sft",
    )
    print(f"   logits {tuple(logits.shape)}, loss {loss.item():.3f} nats per supervised token")

    print("\n3. sft with a source mask made by hand: the first 4 and the first 6 tokens are instruction")
    src_mask = torch.zeros(batch_size, seq_len, dtype=torch.bool)
    src_mask[0, :4] = True
    src_mask[1, :6] = True
    logits, loss = model(
        input_ids=input_ids, attention_mask=attention_mask, src_mask=src_mask, training_mode="sft"
    )
    print(f"   logits {tuple(logits.shape)}, loss {loss.item():.3f} nats per supervised token")

    print("\n4. sft without src_mask is refused")
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, training_mode="sft")
    except ValueError as error:
        print(f"   ValueError: {error}")

    print("\n5. a few optimizer steps: the loss falls")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, 61):
        loss = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            src_mask=batch["src_mask"],
            training_mode="sft",
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"   step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
