"""opd-bench: compare post-training by distillation under matched, metered compute."""
