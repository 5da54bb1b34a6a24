"""Rows of data sets as prompts: files, chat templates, mixing, storage."""
