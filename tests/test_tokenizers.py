"""Loading, digests and the Codec: ids, spans and text as tokenizers know them."""

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from prift.errors import DataError
from prift.text.tokenizers import Codec, load_tokenizer, template_digest, tokenizer_digest
from tests.toy_tokenizers import byte_level, sentencepiece, trimming


def test_bos_is_found_where_the_vocabulary_lacks_common_letters():
    backend = Tokenizer(models.BPE({"<s>": 0, "0": 1, "1": 2, "</s>": 3}, []))
    special = [("<s>", 0), ("</s>", 3)]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert (codec.prefix, codec.eos, codec.ids(["01"])) == ([0], 3, [[1, 2]])
    backend.model = models.BPE({"<s>": 0, "</s>": 3, "x": 1}, [])
    with pytest.raises(DataError, match="so what it puts before a text cannot be told"):
        Codec(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_codec_leaves_the_tokenizer_as_it_was():
    tokenizer = trimming()
    tokenizer("a b", truncation=True, max_length=2)
    before = tokenizer.backend_tokenizer.to_str()
    codec = Codec(tokenizer)
    assert len(codec.ids(["Once upon a time"])[0]) == 4
    codec.spans(["Once"])
    assert tokenizer("Once")["input_ids"] == [1, *codec.ids(["Once"])[0]]
    tokenizer("a b", truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_digests_say_what_is_in_the_tokenizer_and_not_what_it_did():
    tokenizer = trimming("{{ messages }}")
    digest = tokenizer_digest(tokenizer)
    tokenizer("a b", truncation=True, max_length=2)
    tokenizer.name_or_path = "elsewhere"
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(trimming())
    assert len({digest, tokenizer_digest(byte_level()), tokenizer_digest(sentencepiece())}) == 3
    assert len({tokenizer_digest(ByT5Tokenizer()), digest}) == 2
    assert template_digest(tokenizer) != template_digest(trimming("{{ tools }}"))
    assert template_digest(trimming()) is None


def test_load_tokenizer_from_a_folder_with_another_chat_template(tmp_path):
    trimming("old").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "new.jinja").write_text("{{ messages }}")
    assert load_tokenizer(str(tmp_path / "tokenizer")).chat_template == "old"
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), str(tmp_path / "new.jinja"))
    assert tokenizer.chat_template == "{{ messages }}"
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(DataError, match="empty.jinja is empty"):
        load_tokenizer(str(tmp_path / "tokenizer"), str(tmp_path / "empty.jinja"))
    with pytest.raises(DataError, match="--chat-template .*none.jinja cannot be read"):
        load_tokenizer(str(tmp_path / "tokenizer"), str(tmp_path / "none.jinja"))
    with pytest.raises(DataError, match="no tokenizer could be loaded from .*nothing"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_a_model_folder_without_a_tokenizer_is_no_empty_tokenizer(tmp_path):
    """Transformers makes a GPT-2 tokenizer of one token out of a config alone."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        DataError, match="from .*: it has no vocabulary. Name a folder or a hub mod"
    ):
        load_tokenizer(str(tmp_path))
