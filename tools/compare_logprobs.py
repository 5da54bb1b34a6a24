#!/usr/bin/env python3
"""`megatron-opd compare-logprobs` by the name that it had before it was a command."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "compare-logprobs")
    runpy.run_module("megatron_opd", run_name="__main__", alter_sys=True)
