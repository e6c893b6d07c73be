"""From text to batches: sources, tokenizers, chat templates, bins and the dataset."""
