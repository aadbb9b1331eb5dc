"""How tests start `trirank serve` in a process of its own."""

import sys

# In memory: servers that run beside each other could not share the directory that stands for nothing said.
SERVE = [sys.executable, "-m", "engine.cli", "serve", "--events", "memory"]
