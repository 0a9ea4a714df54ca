"""Evaluation: tasks with the prompts and scores of lm-evaluation-harness, perplexity, and what is around them."""

from .items import Item, Options, Prepared, prepare
from .models import GPTModel, Model, load_model
from .perplexity import perplexity
from .rows import BadRow, Row
from .run import Sample, ask, evaluate, summary
from .scoring import GPTScorer, Score, Scored, Scorer
from .task import DataSet, Files, Generation, Question, Source, Task
from .tasks import find_tasks

__all__ = [
    "BadRow",
    "DataSet",
    "Files",
    "GPTModel",
    "GPTScorer",
    "Generation",
    "Item",
    "Model",
    "Options",
    "Prepared",
    "Question",
    "Row",
    "Sample",
    "Score",
    "Scored",
    "Scorer",
    "Source",
    "Task",
    "ask",
    "evaluate",
    "find_tasks",
    "load_model",
    "perplexity",
    "prepare",
    "summary",
]
