"""Model directories as files: configs, tokenizers, weights in both formats, conversion. Needs no Megatron."""
