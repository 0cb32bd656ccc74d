"""What a run computes, judged: the same numbers on every layout (`certify`), and how fast (`study`).

covering     which layouts are tried
reduction    the run's architecture at a size that any machine computes
agreement    the reduced run on one layout, against one device
certify      the layouts of a run, one after the other
isolation    the same, each layout in a process of its own
study        sizes x layouts, one after the other; `study_*` its parts
"""
