"""Bad input to `prift precompute`: a message that says what, what was found and what mends it;
the exit code; no traceback; and nothing lost that was scored before."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import transformers as tf

from tests import cli_fixtures as cli
from tests.toy_tokenizers import CHATML, byte_level

CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def refused(model, data, tmp_path, *words, more=()) -> str:
    """The message of the refusal; the cache is not even begun."""
    message = cli.refused(cli.precompute(model, data, tmp_path / "cache", *more), *words)
    assert not list(tmp_path.glob("cache/*/parts/*"))
    return message


def test_unparsable_line(model, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(cli.ROWS[0]) + "\n{oops\n")
    refused(model, tmp_path / "bad.jsonl", tmp_path, "bad.jsonl:2 is not JSON", "'{oops'")


def test_no_format_fits(model, tmp_path):
    data = cli.write_rows(tmp_path / "rows.jsonl", [{"query": "a", "reply": "b"}])
    refused(
        model, data, tmp_path, "rows.jsonl:1", "columns found: query, reply",
        "prompt-completion: prompt, completion", "messages: messages", "--format",
    )  # fmt: skip


def test_column_missing_later_on(model, tmp_path):
    data = cli.write_rows(tmp_path / "rows.jsonl", [cli.ROWS[0], {"prompt": "a"}])
    refused(
        model, data, tmp_path, "rows.jsonl:2", "no 'completion'", "columns found: prompt",
        "wants prompt, completion",
    )  # fmt: skip


def test_unknown_format(model, data, tmp_path):
    refused(model, data, tmp_path, "'toml'", "question-answer", more=["--format", "toml"])


def test_no_label_token(model, tmp_path):
    data = cli.write_rows(tmp_path / "r.jsonl", [*cli.ROWS, {"prompt": "a", "completion": ""}])
    refused(model, data, tmp_path, "1 of 7 rows have no token to train on", "r.jsonl:7")


def test_on_empty_error(model, data, tmp_path):
    more = ["--max-length", "5", "--on-empty", "error"]
    refused(model, data, tmp_path, "--max-length 5", "rows.jsonl:1", "--on-empty drop", more=more)


def test_messages_without_chat_template(model, tmp_path):
    data = cli.write_rows(tmp_path / "chat.jsonl", CHAT)
    refused(model, data, tmp_path, "chat.jsonl:1", "no chat template", "--chat-template FILE")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    mended = ["--chat-template", str(tmp_path / "chatml.jinja")]
    cli.succeeded(cli.precompute(model, data, tmp_path / "cache", *mended))


def test_chat_template_file(model, tmp_path):
    data = cli.write_rows(tmp_path / "chat.jsonl", CHAT)
    (tmp_path / "empty.jinja").write_text(" ")
    template = ["--chat-template", str(tmp_path / "empty.jinja")]
    refused(model, data, tmp_path, "empty.jinja is empty", more=template)
    absent = cli.precompute(model, data, tmp_path / "cache", "--chat-template", "absent.jinja")
    cli.refused(absent, "'absent.jinja' does not exist", code=2)


def test_longer_than_the_context(model, tmp_path):
    rows = [cli.ROWS[0], {"prompt": "a", "completion": " clips" * 90}]
    data = cli.write_rows(tmp_path / "long.jsonl", rows)
    refused(
        model, data, tmp_path, "longer than the model's context", f"context of {cli.CONTEXT}",
        "long.jsonl:2", f"--max-length {cli.CONTEXT}",
    )  # fmt: skip
    cut = ["--max-length", str(cli.CONTEXT)]
    assert "1 sequences longer" in cli.succeeded(cli.precompute(model, data, tmp_path / "c", *cut))


def test_max_length_over_the_context(model, data, tmp_path):
    more = ["--max-length", str(cli.CONTEXT + 1)]
    words = f"--max-length {cli.CONTEXT + 1}", f"use --max-length {cli.CONTEXT} or less"
    refused(model, data, tmp_path, *words, more=more)


def test_weights_and_data_are_equally_many(model, data, tmp_path):
    more = ["--data-weight", "1", "--data-weight", "2"]
    refused(model, data, tmp_path, "2 --data-weight for 1 --data", more=more)


def test_option_values(model, data, tmp_path):
    for more, word in [
        (["--data-weight", "0"], "'--data-weight'"),
        (["--max-length", "1"], "'--max-length'"),
        (["--dtype", "int8"], "'--dtype'"),
        (["--limit", "some"], "'--limit'"),
    ]:
        cli.refused(cli.precompute(model, data, tmp_path / "cache", *more), word, code=2)


def test_no_such_file_or_hub_name(model, data, tmp_path):
    refused(model, "absent.jsonl", tmp_path, "--data absent.jsonl: no such file")
    refused(model, "nobody/absent", tmp_path, "--data nobody/absent", "the hub")
    refused("./absent", data, tmp_path, "--model ./absent: no such folder")
    refused("nobody/absent", data, tmp_path, "--model nobody/absent: no such folder", "the hub")


def test_no_tokenizer(copy, data, tmp_path):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    message = refused(str(copy), data, tmp_path, "no tokenizer", "--tokenizer")
    assert str(copy) in message


def test_folder_without_safetensors(copy, data, tmp_path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(
        str(copy), data, tmp_path, "no model.safetensors", "found: pytorch_model.bin",
        "save_pretrained",
    )  # fmt: skip


def test_damaged_safetensors(copy, data, tmp_path):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(str(copy), data, tmp_path, "model.safetensors", "cut short or damaged")


def test_weights_that_do_not_fit_the_config(copy, data, tmp_path):
    """transformers would fill in random numbers, and the statistics would be noise."""
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, copy / "model.safetensors", {"format": "pt"})
    refused(str(copy), data, tmp_path, "do not fit its config.json", "lm_head.weight")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    refused(str(copy), data, tmp_path, "do not fit its config.json", "tensors")


def test_folder_that_is_no_model(tmp_path, data):
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), data, tmp_path, "no config.json")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(str(tmp_path / "empty"), data, tmp_path, "config.json")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tf.T5Config, ["encoder-decoder", "t5"]),
        (tf.BartConfig, ["encoder-decoder", "bart"]),
        (tf.LlavaConfig, ["multimodal", "llava", "vision_config"]),
        (tf.Qwen2VLConfig, ["multimodal", "qwen2_vl"]),
        (tf.Gemma3Config, ["multimodal", "gemma3"]),
        (tf.BertConfig, ["an encoder", "bert"]),
        (tf.ViTConfig, ["vit", "not a causal language model"]),
    ],
)
def test_models_of_another_kind(config, words, data, tmp_path):
    config().save_pretrained(tmp_path / "model")
    refused(str(tmp_path / "model"), data, tmp_path, *words)


def test_token_outside_the_vocabulary(data, tmp_path):
    small = cli.make_model(tmp_path / "small", vocab_size=100)
    refused(small, data, tmp_path, "rows.jsonl:1", "vocabulary of 100", "--tokenizer")


def test_nan_names_the_example_and_keeps_the_others(copy, tmp_path):
    """One token's embedding is NaN; only the third row has it."""
    rows = [*cli.ROWS[:2], {"prompt": "Z " * 3, "completion": " clips"}, *cli.ROWS[2:]]
    data = cli.write_rows(tmp_path / "rows.jsonl", rows)
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    weights["model.embed_tokens.weight"][byte_level()("Z")["input_ids"]] = float("nan")
    safetensors.torch.save_file(weights, copy / "model.safetensors", {"format": "pt"})
    one_by_one = ["--batch-tokens", "1"]
    stopped = cli.precompute(str(copy), data, tmp_path / "cache", *one_by_one)
    cli.refused(stopped, "rows.jsonl:3", "NaN", "--dtype")
    kept = list(tmp_path.glob("cache/*/parts/*.parquet"))
    assert len(kept) == 1  # the longer sequences came first and are not lost
    cli.write_rows(Path(data), cli.ROWS)
    said = cli.succeeded(cli.precompute(str(copy), data, tmp_path / "cache"))
    assert "6 in the cache, 0 to score" in said


def test_cache_that_is_a_file(model, data, tmp_path):
    (tmp_path / "cache").write_text("")
    done = cli.precompute(model, data, tmp_path / "cache")
    cli.refused(done, "cannot write to the cache", str(tmp_path / "cache"))


def test_full_disk(model, data, tmp_path):
    command = ["prift", "precompute", "--model", model, "--data", data]
    stopped = cli.shell([*command, "--cache", tmp_path / "cache"], room=2000)
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    assert f"Error: cannot write to the cache {tmp_path / 'cache'}" in stopped.stderr
    assert "run the same command again" in stopped.stderr
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".parquet", ".tmp")]
    assert "6 to score" in cli.succeeded(cli.precompute(model, data, tmp_path / "cache"))
