#!/usr/bin/env python3
"""`megatron-opd convert`, `inspect` and `verify` by the name that they had before they were commands."""

import runpy
import sys

if __name__ == "__main__":
    if sys.argv[1:2] not in (["inspect"], ["verify"]):
        sys.argv.insert(1, "convert")
    runpy.run_module("megatron_opd", run_name="__main__", alter_sys=True)
