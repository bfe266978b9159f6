"""The console: a web page that shows what a learner does, and asks it for things.

It is served by the learner's own HTTP server and needs no other: no build step, no database, no network. `site.py`
serves the page and answers its questions in JSON; `query.py` makes those answers, `curves.py` their numbers, and
`watch.py` keeps what only passes by. The page asks for things on the same addresses as the command line does.
"""
