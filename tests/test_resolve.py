"""Names are found in the working directory, then the checkout, then the bundled copy."""

import pytest

from covo_rl import resolve


def test_the_working_directory_comes_first(tmp_path, monkeypatch):
    assert resolve.find("rewards", "accuracy.py").parent.name == "rewards"
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.py").write_text("def mine(completions, **kwargs): ...")
    monkeypatch.chdir(tmp_path)
    assert resolve.names("rewards")["mine"] == (tmp_path / "rewards" / "mine.py", "working directory")
    assert resolve.names("rewards")["accuracy"][1] in ("checkout", "bundled")


def test_the_bundled_copy_serves_where_there_is_no_checkout(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "covo_rl"
    (package / "_bundled" / "recipes").mkdir(parents=True)
    (package / "_bundled" / "recipes" / "r.py").write_text("")
    (tmp_path / "site-packages" / "recipes").mkdir()  # another wheel's folder is not a checkout
    monkeypatch.setattr(resolve, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    assert resolve.folders("recipes") == [("bundled", package / "_bundled" / "recipes")]


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(FileNotFoundError, match=r"did you mean 'accuracy.py'.*format.py"):
        resolve.find("rewards", "acuracy.py")


@pytest.mark.parametrize("name", ["../README.md", "/etc/passwd"])
def test_a_name_cannot_leave_its_folder(name):
    with pytest.raises(ValueError, match="inside the rewards folder"):
        resolve.find("rewards", name)
