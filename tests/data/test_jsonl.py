"""What is wrong with a JSONL file is said with its name and line, what is right survives writing and reading.

Not proved here: rules of one kind of row (test_streams).
"""

import pytest

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data import jsonl


def test_unknown_fields_and_text_survive(tmp_path):
    rows = [{"prompt": "é\n\u2028x", "more": [1, {"a": None}]}, {"prompt": "b"}]
    jsonl.write(tmp_path / "a.jsonl", rows)
    assert jsonl.read(tmp_path / "a.jsonl", ["prompt"]) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a"', "line 3 is no JSON at column"),
        (b'["prompt"]', "line 3 is no JSON object"),
        (b'{"promt": "a"}', 'line 3 has no "prompt"; it has promt'),
        (b'{"prompt": 5}', 'line 3: "prompt" is 5, not text'),
        (b'{"prompt": ["a"]}', "not text"),
        (b'{"prompt": ""}', 'line 3: "prompt" is empty'),
        (b'{"prompt": "\xff"}', "line 3 is not UTF-8"),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b'\n{"prompt": "fine"}\n')
    with pytest.raises(BadInput) as error:
        jsonl.read(path, ["prompt"])
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_lists_are_demanded_as_lists(tmp_path):
    path = tmp_path / "rankings.jsonl"
    path.write_text('{"responses": "ab"}\n')
    with pytest.raises(BadInput, match='line 1: "responses" is "ab", not a list'):
        jsonl.read(path, ["responses"])


def test_an_empty_response_is_a_response(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": ""}\n')
    assert jsonl.read(path, ["prompt", "response"])[0]["response"] == ""


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match="absent.jsonl is missing"):
        jsonl.read(tmp_path / "absent.jsonl", ["prompt"])
