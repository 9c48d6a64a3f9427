"""From records to batches: sources -> conversation -> encode -> collate, and a preview of it."""
