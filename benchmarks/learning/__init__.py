"""How well it learns, on anyone's data, beside what a user could pick instead: `python -m benchmarks.learning`.

`reading` turns files into examples, `protocols` decides what is shown when, `live` is the learner that ships
without Kafka around it, `rivals` are what a user could pick instead, `scores` is arithmetic, and `cells`
keeps what was measured.
"""
