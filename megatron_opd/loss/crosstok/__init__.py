"""Teachers with a tokenizer of their own: the same text in two cuts, aligned by bytes and compared span by span."""
