"""A masked-diffusion language model on the stock Qwen3 of transformers, in one file. Written by unmask.

`forward` denoises: `logits[:, i]` predicts token i, mask tokens and all others given. `generate` fills a canvas of
masks, the most confident tokens first, and has no cache; the `unmask` library has more of both.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import CausalLMOutput


class MaskedDiffusionConfig(Qwen3Config):
    model_type = "unmask_qwen3"


# How stock weights are stored otherwise than they are computed with: experts one by one.
stored = get_checkpoint_conversion_mapping(MaskedDiffusionConfig.model_type.removeprefix("unmask_"))
if stored is not None:
    register_checkpoint_conversion_mapping(MaskedDiffusionConfig.model_type, stored, overwrite=True)


class MaskedDiffusionForCausalLM(Qwen3ForCausalLM):
    config_class = MaskedDiffusionConfig

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        src_mask: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Denoise ids (B, L), mask tokens included.

        Args:
            attention_mask: (B, L), 1 = token, 0 = padding, which is never attended.
            src_mask: (B, L), True = prompt; block-causal models start a block where a response starts.
        """
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_token = is_token.bool()
        position = (is_token.long().cumsum(dim=1) - 1).clamp(min=0)
        attend = is_token[:, None, :] & is_token[:, :, None]
        if self.config.attention == "block_causal":
            is_prompt = torch.zeros_like(is_token) if src_mask is None else src_mask.bool()
            block = self._blocks(position, is_prompt, is_token)
            attend = attend & (block[:, None, :] <= block[:, :, None])
        attend = attend | torch.eye(input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
        bias = torch.zeros(attend.shape, dtype=self.dtype, device=input_ids.device)
        bias = bias.masked_fill(~attend, torch.finfo(self.dtype).min)[:, None]
        output = self.model(input_ids=input_ids, attention_mask=bias, position_ids=position, use_cache=False)
        hidden = output.last_hidden_state
        if self.config.logit_shift:  # the output at the token before predicts a token
            column = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
            last = torch.where(is_token, column, -1).cummax(dim=1).values
            previous = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)
            previous = torch.where(previous < 0, column, previous)
            hidden = hidden.gather(1, previous[..., None].expand_as(hidden))
        return CausalLMOutput(logits=self.lm_head(hidden))

    def _blocks(self, position: Tensor, is_prompt: Tensor, is_token: Tensor) -> Tensor:
        """Number the blocks (B, L) of each row."""
        response = is_token & ~is_prompt
        before = torch.cat([torch.zeros_like(response[:, :1]), response[:, :-1]], dim=1)
        run = (response != before) | (position == 0)
        start = torch.zeros_like(position)
        if self.config.block_anchor == "response":
            start = torch.where(run, position, 0).cummax(dim=1).values
        elif self.config.block_anchor == "prompt_end":
            start = torch.where(run & response, position, 0).amax(dim=1, keepdim=True).expand_as(position)
        first = (position == 0) | ((position - start) % self.config.block_length == 0)
        return (first & is_token).long().cumsum(dim=1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        steps: int | None = None,
        temperature: float = 0.0,
        **_: Any,
    ) -> Tensor:
        """Fill a canvas of masks after each prompt; left padding, as the tokenizer makes it.

        Args:
            steps: denoising steps over the whole canvas, each of as many tokens, rounded up; one a token by default.
            temperature: 0 = the most likely token.

        Returns:
            Prompt and response (B, P + max_new_tokens); padding after the end token.
        """
        config, length = self.config, input_ids.shape[1]
        canvas = input_ids.new_full((len(input_ids), max_new_tokens), config.mask_token_id)
        ids = torch.cat([input_ids, canvas], dim=1)
        is_token = torch.ones_like(ids)
        if attention_mask is not None:
            is_token[:, :length] = attention_mask
        is_prompt = (torch.arange(ids.shape[1], device=ids.device) < length).expand(ids.shape)
        block = torch.zeros_like(ids)
        if config.attention == "block_causal":
            block = self._blocks((is_token.cumsum(dim=1) - 1).clamp(min=0), is_prompt, is_token.bool())
        settings = self.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        never = {config.mask_token_id, *(getattr(settings, "suppress_tokens", None) or [])}
        never |= set(getattr(settings, "unused_tokens", None) or [])
        never = torch.tensor(sorted(never - set(ends)), device=ids.device)
        each = -(-max_new_tokens // (steps or max_new_tokens))  # tokens a step
        masked = ~is_prompt
        while masked.any():
            logits = self(ids, is_token, is_prompt).logits.float()
            logits[..., never] = -torch.inf
            p = (logits / (temperature or 1.0)).softmax(dim=-1)
            token = p.argmax(dim=-1)
            if temperature > 0:
                token = torch.multinomial(p.flatten(0, 1), 1).view(ids.shape)
            confidence = logits.softmax(dim=-1).gather(2, token[..., None])[..., 0]
            current = torch.where(masked, block, block.max() + 1).amin(dim=1, keepdim=True)
            open_now = masked & (block == current)
            rank = (
                torch.where(open_now, confidence, -1.0)
                .argsort(dim=1, descending=True, stable=True)
                .argsort(dim=1)
            )
            commit = open_now & (rank < each)
            ids = torch.where(commit, token, ids)
            masked = masked & ~commit
            ended = torch.isin(ids, torch.tensor(ends, device=ids.device)) & ~is_prompt & ~masked
            after = (ended.cumsum(dim=1) - ended.long()) > 0
            pad = settings.pad_token_id if settings.pad_token_id is not None else ends[0]
            ids, masked = torch.where(after, pad, ids), masked & ~after
        return ids
