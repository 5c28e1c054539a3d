"""Data: questions about images whose answers are known, from wherever they come.

[`load_samples`] takes a name and gives a list of [`Sample`]:

- `easy-vqa`, `scenes`, `reading`, `descriptions`: built in, so that there is something to measure on without a
  download.
- `questions.jsonl`: a file of JSON objects, one a line, read by [`read_samples`].
- `org/dataset:split`, or a local folder or Parquet file: what the `datasets` library can load.

Whatever is wrong with the data is said in one sentence that names the line or row, before any model is loaded. Images
are opened later, one by one, because all of them need not fit into memory.
"""

from transformers_sgl.evaluation.data.descriptions import Descriptions
from transformers_sgl.evaluation.data.json_lines import read_samples
from transformers_sgl.evaluation.data.load import load_samples
from transformers_sgl.evaluation.data.pages import Page, Pages
from transformers_sgl.evaluation.data.samples import Sample
from transformers_sgl.evaluation.data.scenes import Question, Scene, SceneObject, Scenes

__all__ = [
    "Descriptions",
    "Page",
    "Pages",
    "Question",
    "Sample",
    "Scene",
    "SceneObject",
    "Scenes",
    "load_samples",
    "read_samples",
]
