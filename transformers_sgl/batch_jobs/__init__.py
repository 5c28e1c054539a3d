"""Answers a whole data set: two pools of workers, one for each model of a pair, that scale apart, or an engine."""

from __future__ import annotations

from transformers_sgl.batch_jobs.job import BatchReport, run_batch

__all__ = ["BatchReport", "run_batch"]
