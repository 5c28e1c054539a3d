"""Lets `python -m transformers_sgl` stand for the console command."""

import sys

from transformers_sgl.cli import main

sys.exit(main())
