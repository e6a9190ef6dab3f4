"""Keeps a plain `pytest` from collecting the tests that run inside a host: each version needs a process of its own."""

import os

collect_ignore = [] if os.environ.get("SANA_TEST_HOST") else ["inprocess"]
