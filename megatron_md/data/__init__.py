"""Data: corpora, tokenizer, WebDataset shards of tokens, and the order in which a run reads them."""
