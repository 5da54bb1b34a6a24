"""On-policy distillation of large language models at cluster scale, on Megatron-core and SGLang."""

__version__ = "0.1.0"
