"""Secrets in texts: whatever they contain, nothing of them is left, and the rest stays readable."""

import json
import re
import string
import time
from pathlib import Path

import planted_secrets
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from raysweep.errors import InfrastructureError, SpecError
from raysweep.redaction import redact_secrets, redact_value

# A password may be any text of one line. It starts with a mark by which its rest is found again.
MARK = "hUsH"
PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " ü"
PASSWORDS = st.tuples(
    st.text(PRINTABLE, max_size=6), st.text(PRINTABLE.replace("\\", ""), max_size=6)
).map(lambda parts: f"{parts[0].strip()}{MARK}{parts[1].strip()}{MARK}")
# Values in queries, connection strings and YAML, where other characters end them.
PLAIN = st.text(string.ascii_letters + string.digits + "+/=%_-.@!", max_size=8).map(
    lambda text: f"{MARK}{text}{MARK}"
)
SCHEMES = st.sampled_from(["postgresql", "mysql+pymysql", "http", "https", "s3", "ray", "redis"])
SENTENCES = st.sampled_from(
    [
        "{}",
        "cannot open {}: refused",
        "'{}'",
        "MLflow store {}; set MLFLOW_TRACKING_URI",
        "a\n{}\nb",
    ]
)
NAMES = st.sampled_from(
    ["password", "db_password", "PGPASSWORD", "client_secret", "X-Amz-Signature", "auth_token",
     "aws_secret_access_key", "AccountKey", "apiKey", "credential", "MYSQL_PWD"]
)  # fmt: skip
QUOTES = st.sampled_from(["'{}'", '"{}"', "{}"])
FAST = settings(max_examples=200, deadline=None)


@FAST
@given(SCHEMES, st.sampled_from(["", "me", "me.too", "a-b"]), PASSWORDS, SENTENCES)
@example("postgresql", "me", f"{MARK}/x@y z {MARK}", "cannot open {}: refused")
@example("http", "", f"{MARK}://{MARK}", "{}")
@example("postgresql", "", f"8 0{MARK}{MARK}", "{}")
@example("postgresql", "me", f"0 0{MARK}{MARK}", "{}")
def test_no_part_of_a_password_of_a_url_is_left(
    scheme: str, user: str, password: str, sentence: str
) -> None:
    # What looks like a port with a sentence behind it, or like another URL, is not unclear enough.
    assume("://" not in password or " " not in password)
    assume(not (user and re.match(r"[1-9]\d{0,4}[]:;,.)'\"]*\s", password)))
    text = sentence.format(f"{scheme}://{user}:{password}@host/db")
    masked = redact_secrets(text)
    assert MARK not in masked and "host/db" in masked
    assert redact_secrets(masked) == masked


@FAST
@given(SCHEMES, PLAIN.map(lambda text: text.replace("/", "")), SENTENCES)
def test_a_token_in_place_of_a_user_is_a_secret(scheme: str, token: str, sentence: str) -> None:
    masked = redact_secrets(sentence.format(f"{scheme}://{token}@host:5000/x"))
    assert MARK not in masked and "host:5000/x" in masked


@FAST
@given(st.one_of(NAMES, st.sampled_from(["sig", "key", "access_token"])), PLAIN, SENTENCES)
def test_a_secret_field_of_a_query_is_masked_and_the_others_stay(
    name: str, value: str, sentence: str
) -> None:
    masked = redact_secrets(sentence.format(f"https://h/x?region=eu&{name}={value}&scheme=http"))
    assert MARK not in masked
    assert "region=eu" in masked and "scheme=http" in masked


@FAST
@given(
    NAMES, PASSWORDS, st.sampled_from(["'{}'", '"{}"', "{}"]), st.sampled_from([": ", " = ", "="])
)
def test_a_value_under_the_name_of_a_secret_is_masked(
    name: str, value: str, quotes: str, sign: str
) -> None:
    assume(quotes[0] == "{" or quotes[0] not in value)
    if quotes == "{}":
        value = "".join(character for character in value if character not in "\"'&,;)]}#=").strip()
    masked = redact_secrets(f"user: me\n{name}{sign}{quotes.format(value)}\nhost: h")
    assert MARK not in masked
    assert masked.startswith("user: me\n") and masked.endswith("\nhost: h")


@FAST
@given(NAMES, st.text(max_size=8).map(lambda text: f"{MARK}{text}{MARK}"))
def test_values_of_log_entries_are_masked(name: str, value: str) -> None:
    entry = {"nested": [{name: value}, f"see {json.dumps({name: value})}"], "epoch": 3}
    masked = redact_value(entry)
    assert MARK not in json.dumps(masked) and masked["epoch"] == 3


@pytest.mark.parametrize(
    "end", ["", "-----END RSA PRIVATE KEY-----\n", "-----END PRIVATE KEY-----"]
)
@pytest.mark.parametrize(
    "begin", ["-----BEGIN RSA PRIVATE KEY-----\n", "-----BEGIN PRIVATE KEY-----"]
)
def test_keys_in_pem_format_are_masked(begin: str, end: str) -> None:
    body = "\n".join("hUsHx1234567890+/" * 3 for _ in range(4)) + "\n"
    assert MARK not in redact_secrets(f"read\n{begin}{body}{end}")
    assert MARK not in redact_secrets(json.dumps(f"{begin}{body}{end}"))
    if end:
        assert MARK not in redact_secrets(f"{body}{end}"), "the beginning was cut off"


@pytest.mark.parametrize(
    "text",
    [
        "s3://b/x?endpoint_override=minio:9000&scheme=http; gs://anonymous@b",
        "http://127.0.0.1:5000: there is no model lrat@champion",
        "models:/NAME@champion: no model",
        "http://mlflow:5000: there is no model lrat@champion",
        "sqlite:////home/me@work/mlflow.db",
        "InvalidAuthToken: the token of this cluster is another one",
        "s3://...@b: credentials belong in the environment, not in a URI",
        "took over 's1' from process 3 on h since 2026-01-01 12:00:00 for a@b",
        "2026-03-01T02:00:00.123Z INFO me@host",
        "epoch 3: n_tokens=5, tokenizer: x, keys: a, b",
        "PWD=/home/me/runs OLDPWD=~/x",
        "{'PWD': '/home/me/runs', 'n': 1}",
        "unexpected token: '}' at line 3, column 7",
        "Basic information: basic research needs basic-blocks",
    ],
)
def test_what_holds_no_secret_stays(text: str) -> None:
    assert redact_secrets(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "invalid token: {}",
        "MYSQL_PWD=/{}",
        "pwd: {}",
        "unexpected password: {}x",
        "Basic dXNlcjp{}",
        "basic bTp{}=",
        "Bearer {}",
        "remote: glpat-{}{}",
    ],
)
def test_what_looks_like_an_ordinary_message_is_masked(text: str) -> None:
    assert "Zx9" not in redact_secrets(text.replace("{}", "Zx9Zx9Zx9"))


def test_a_secret_that_begins_as_another_leaves_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_TOKEN", "longer-than-8")
    monkeypatch.setenv("B_TOKEN", "longer-than-8-hUsH")
    assert redact_secrets("it is longer-than-8-hUsH") == "it is ***"
    assert redact_value(["longer-than-8-hUsH", {"x": "longer-than-8"}]) == ["***", {"x": "***"}]


def test_a_secret_of_the_environment_is_masked_also_as_a_url_writes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGPASSWORD", "corr ect/hörse@")
    for text in (
        "x corr ect/hörse@ y",
        "x corr%20ect%2Fh%C3%B6rse%40 y",
        "x corr+ect%2Fh%C3%B6rse%40 y",
    ):
        assert redact_secrets(text) == "x *** y"


def test_errors_hold_no_secrets() -> None:
    error = SpecError(["a", "postgresql://me:hUsH@h/db: refused"])
    assert MARK not in str(error) and error.problems[0] == "a"
    assert MARK not in str(InfrastructureError("?sig=hUsHhUsH").with_prefix("x "))


@pytest.mark.parametrize("piece", ["a:", "a:/", "@", "token", "=", "x=1&", "'", "://a:1 ", "aB3/"])
def test_long_texts_take_little_time(piece: str) -> None:
    """Compared with a text without anything suspicious: no pattern is worse than slow."""
    text = piece * (20_000 // len(piece)) + "@"
    began = time.process_time()
    redact_secrets(text)
    assert time.process_time() - began < 20


def test_the_search_for_planted_secrets_finds_them(tmp_path: Path, capsys) -> None:
    """`python tests/planted_secrets.py` would say nothing of what its search cannot see."""
    planted_secrets.check_search(tmp_path)
    assert re.search("9 files and [3-9] command lines, all found", capsys.readouterr().out)
