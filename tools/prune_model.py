#!/usr/bin/env python3
"""`megatron-opd prune` by the name that it had before it was a command."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "prune")
    runpy.run_module("megatron_opd", run_name="__main__", alter_sys=True)
