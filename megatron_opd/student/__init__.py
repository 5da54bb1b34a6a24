"""The Megatron side: everything here (and only here and in teachers/megatron_teacher.py) touches megatron.core.

`Student` in student.py is what the rest of the program sees: step, evaluate, export, state.
"""
