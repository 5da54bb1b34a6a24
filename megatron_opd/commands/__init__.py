"""The commands of `megatron-opd`, a module each: `add(commands)` its options, `run(arguments)` -> exit code.

Whatever is slow to import is imported inside `run`, because every call of the program imports all of these.
"""
