"""Tasks of lm-eval in files of a test's own folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def task_in(
    folder: Path, name: str, documents: Sequence[Mapping[str, Any]], **settings: Any
) -> Path:
    """The folder, with a task of these documents in it."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def choices_in(folder: Path, name: str = "letters", **settings: Any) -> Path:
    """The folder, with 12 questions of two choices each."""
    documents = [
        {"question": f"reverse {a}{b}=", "choices": [b + a, a + a], "answer": 0}
        for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)
    ]
    more = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm")
        ],
    }
    return task_in(folder, name, documents, **(more | settings))


def perplexity_in(folder: Path, name: str = "texts") -> Path:
    """The folder, with texts whose likelihood is measured: less is better."""
    texts = ["roman 12=XII", "reverse abc=cba", "sort cab=abc", "roman 7=VII"]
    return task_in(
        folder,
        name,
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )


def generated_in(folder: Path, name: str, prompts: Sequence[str], **generation: Any) -> Path:
    """The folder, with prompts that are to be answered by text."""
    return task_in(
        folder,
        name,
        [{"prompt": prompt, "answer": "x"} for prompt in prompts],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        generation_kwargs={"until": ["###"], "do_sample": False, **generation},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
