"""Limits of numbers that cross processes and programs: each is known here only.

Browsers hold integers exactly up to 2**53, so nothing that they show or send is larger.
"""

MAX_SEQ = 2**53  # of an event in its job's log
MAX_STEP = 2**53  # of a training
MAX_ROLLBACKS = 2**31  # of an attempt
