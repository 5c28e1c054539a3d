"""Large models in other engines: each gets a pruned prompt and does everything else by itself."""
