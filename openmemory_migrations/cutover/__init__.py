"""The last step, in a lineage of its own: `v_vector` becomes `v`, or `v` goes; and the way back.

gate      what has to hold, and whether it does: every row compared to the bit
forward   prepares what takes time, then switches in one short transaction
restore   rebuilds the bytes while the application writes, then switches back in one
mark      how a table says that it was cut over, and what the way back has to know
kept      a table for rows that no vector can hold, which leave and come back
prepared  what a run has ready for its switch, and takes back where it doesn't come to it
backtrigger   what keeps bytes in step with vectors
"""
