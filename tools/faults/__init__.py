"""Faults that a campaign injects into small runs, and the rules that judge how a run took them.

`kinds` lists the kinds of fault; each plays one on a `stage.Stage`, which runs programs, and hands what it saw to
`judge`, whose rules are the same for all kinds. `inject` is what runs inside the processes of a run.
"""
