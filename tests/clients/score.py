"""Score a server by lm-evaluation-harness: `python score.py URL QUESTIONS PAGES`, JSON to stdout.

It runs in `.venv-clients`. Both files are JSON lines: multiple choices as arc_easy's, and texts
whose perplexity is measured as wikitext's.
"""

import json
import sys
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager


def task(name: str, file: str, **more: Any) -> dict[str, Any]:
    """A task on a file of our own."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}}
    return {"task": name, "test_split": "test", "num_fewshot": 0, **data, **more}


def main(url: str, questions: str, pages: str) -> None:
    """Print each sample's answers and what is made of them."""
    tasks = [
        task(
            "own_arc_easy",
            questions,
            output_type="multiple_choice",
            doc_to_text="Question: {{question}}\nAnswer:",
            doc_to_choice="{{choices}}",
            doc_to_target="{{answer}}",
            metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        ),
        task(
            "own_wikitext",
            pages,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{page}}",
            metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        ),
    ]
    model = {"model": "small", "base_url": f"{url}/v1/completions", "auth_token": "sesame"}
    model |= {"tokenizer_backend": "remote", "max_length": 2048, "batch_size": 3}
    told = lm_eval.simple_evaluate(
        "local-completions",
        model_args=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert told is not None
    samples = {
        name: [sample["filtered_resps"] for sample in sorted(of, key=lambda one: one["doc_id"])]
        for name, of in told["samples"].items()
    }
    print(json.dumps({"results": told["results"], "samples": samples}, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
