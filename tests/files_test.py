import pytest

from ffl_jax.workdir import files


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    assert files.read_json(path) == {}
    files.write_json(path, {"a": [1, 2.5, None]})
    files.write_json(path, {"b": 1})
    assert files.read_json(path) == {"b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    with pytest.raises(TypeError):
        files.write_json(path, {"b": object()})
    assert files.read_json(path) == {"b": 1}


@pytest.mark.parametrize("content", [b"", b'{"a"', b"[1]", b"3", b"\xff\xfe", b"[" * 10**5])
def test_what_is_not_ours_is_empty(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content)
    assert files.read_json(tmp_path / "summary.json") == {}
