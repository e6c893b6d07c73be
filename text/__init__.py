"""From text to batches: sources, tokenizers, chat templates, token files and the dataset that serves them."""
