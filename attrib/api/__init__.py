"""Lines of Python over the objects of the runner, with the same numbers: explain, evaluate, compare; results.

``parts`` makes objects of what people say, ``inputs`` a dataset of what they hand over; ``computing`` does with them
what a run does, without a work directory. ``work_directory`` opens what a run has left, and needs no torch. Nothing is
imported here: the names are those of the package ``attrib``.
"""
