"""Addresses as Ollama reads them, and the way there: proxies, certificates, passwords."""

import copy
import ssl
from base64 import b64encode
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_ollama import timed

from distill.address import Address, default_host, masked
from distill.errors import BadInput, TeacherUnavailable
from distill.teacher.connection import open_client, proxy_of
from distill.teacher.ollama_client import OllamaClient

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "OLLAMA_HOST", "OLLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("text", "url"),
    [  # the cases of Ollama's own test of OLLAMA_HOST
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":1234", "http://127.0.0.1:1234"),
        ("1.2.3.4:1234", "http://1.2.3.4:1234"),
        ("example.com", "http://example.com:11434"),
        ("example.com:1234", "http://example.com:1234"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::1]:1337", "http://[::1]:1337"),
        (" 1.2.3.4 ", "http://1.2.3.4:11434"),
        ('"1.2.3.4"', "http://1.2.3.4:11434"),
        (' " 1.2.3.4 " ', "http://1.2.3.4:11434"),
        ("'1.2.3.4'", "http://1.2.3.4:11434"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("https://1.2.3.4:4321", "https://1.2.3.4:4321"),
        ("https://example.com/ollama", "https://example.com:443/ollama"),
        ("ollama.com", "https://ollama.com:443"),
        # where a server listens on is no address to ask
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("[::]:8080", "http://[::1]:8080"),
        ("127.0.0.1:11434 ", "http://127.0.0.1:11434"),
        ('"127.0.0.1:11434"', "http://127.0.0.1:11434"),
        ("http://me:pass%40@gpu/a/", "http://gpu:80/a"),
    ],
)
def test_addresses_are_read_as_ollama_reads_them(text: str, url: str) -> None:
    assert Address(text).url == url


@pytest.mark.parametrize(
    "text",
    [
        "localhost:abc",
        "gpu:0",
        "gpu:66000",
        "gpu:-1",
        "ftp://gpu",
        "a b",
        "gpu?x",
        "a..b",
        "[::1",
        "a:b:c",
        "http://@:x",
    ],
)
def test_what_is_no_address_is_one_line_that_names_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput) as caught:
        Address(text)
    assert str(caught.value).startswith(f"{text!r}: is no server's address: ")
    monkeypatch.setenv("OLLAMA_HOST", f'"{text} "')
    with pytest.raises(BadInput, match=r"^OLLAMA_HOST='.*is no server's address"):
        default_host()
    OllamaClient("gpu").close()  # a bad variable doesn't matter where an address is given


@pytest.mark.parametrize(
    ("text", "shown", "login"),
    [
        ("http://me:secret@gpu:1", "http://me:***@gpu:1", ("me", "secret")),
        (" 'me:secret@gpu' ", "me:***@gpu", ("me", "secret")),
        ("https://:s%3Aecret@gpu", "https://:***@gpu", ("", "s:ecret")),
    ],
)
def test_passwords_are_never_shown(text: str, shown: str, login: tuple[str, str]) -> None:
    for address in (Address(text), copy.deepcopy(Address(text))):
        assert (str(address), repr(address), f"{address}") == (shown, repr(shown), shown)
        assert address.login == login
        assert "ecret" not in address.url
    assert "ecret" not in masked(f"--set teacher.hosts=[{text}]")
    for broken in (text.replace("gpu", "gpu:x:y"), text.replace("gpu", "gpu/a@b"), text.replace("ecret", "/e cret")):
        with pytest.raises(BadInput) as caught:
            OllamaClient(broken)
        assert "cret" not in str(caught.value)


def test_a_password_is_sent_and_told_again_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with timed(1, 0) as server:
        host = server.url.replace("://", "://me:p%2Fw@")
        seen: list[str] = []
        client = OllamaClient(host)
        client._client.event_hooks = {"request": [lambda request: seen.append(request.headers["authorization"])]}
        client.version()
        client.close()
    assert seen == ["Basic " + b64encode(b"me:p/w").decode()]
    assert Address(host).login == ("me", "p/w")
    kept = Address(str(Address(host)))
    with pytest.raises(BadInput, match=r"\*\*\*.*its password isn't kept"):
        OllamaClient(kept)
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert kept.login == ("me", "p/w")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1:80", "::1", "0.0.0.0", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks://x:1", "socks5h://x:1", "bad:proxy:url", "http://["])
def test_loopback_is_never_sent_through_a_proxy(host: str, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES[:3]:
        monkeypatch.setenv(name, proxy)
    assert proxy_of(Address(host)) is None
    open_client(Address(host), 1, "OLLAMA_API_KEY").close()


def test_a_server_here_answers_behind_broken_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES[:3]:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "::1/128")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    monkeypatch.setenv("OLLAMA_HOST", "localhost:abc")
    with timed(1, 0) as server:
        client = OllamaClient(server.url)
        assert client.version()
        client.close()


@pytest.mark.parametrize(
    ("variables", "host", "says"),
    [
        ({"HTTP_PROXY": "bad:proxy:url"}, "gpu", "HTTP_PROXY=bad:proxy:url: is no proxy"),
        ({"HTTP_PROXY": "http://"}, "gpu", "HTTP_PROXY=http://: is no proxy"),
        ({"HTTP_PROXY": "no proxy here"}, "gpu", "HTTP_PROXY=no proxy here: is no proxy"),
        ({"ALL_PROXY": "socks://127.0.0.1:7890"}, "gpu", "ALL_PROXY=socks://127.0.0.1:7890: is no proxy"),
        ({"HTTPS_PROXY": "http://me:secret@x:y"}, "https://gpu", r"HTTPS_PROXY=http://me:\*\*\*@x:y: is no proxy"),
        ({"ALL_PROXY": "socks5h://127.0.0.1:7890"}, "gpu", "ALL_PROXY=socks5h.*pip install socksio"),
        ({"SSL_CERT_FILE": "/nowhere"}, "https://gpu", "SSL_CERT_FILE=/nowhere: can't be used"),
        ({"SSL_CERT_FILE": __file__}, "https://gpu", "SSL_CERT_FILE=.*test_address.py: can't be used"),
        ({"SSLKEYLOGFILE": "/nowhere/log"}, "https://gpu", "SSLKEYLOGFILE=/nowhere/log: can't be used"),
        ({"OLLAMA_API_KEY": "ключ"}, "gpu", "OLLAMA_API_KEY: holds characters"),
    ],
)
def test_a_bad_variable_is_named(
    variables: dict[str, str], host: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.teacher.connection.importlib.util.find_spec", lambda name: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=f"^{says}"):
        OllamaClient(host)
    if "API" not in says:
        OllamaClient("127.0.0.1:9").close()


def test_a_silent_proxy_and_an_unknown_authority_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    with pytest.raises(TeacherUnavailable, match=r"^gpu: no Ollama answers there through HTTP_PROXY=http://me:\*\*\*@"):
        OllamaClient("gpu", retries=0).post("/api/generate", {})
    client = OllamaClient("https://localhost")
    unknown = client._silent(httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"))
    assert "its certificate isn't believed; name the file of its authority in SSL_CERT_FILE" in str(unknown)


@pytest.mark.parametrize(
    ("rules", "host", "spared"),
    [
        ("localhost,127.0.0.0/8,::1/128", "gpu", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("fe80::/10", "fe80::1", True),
        ("example.com", "a.example.com", True),
        (".example.com", "a.Example.com", True),
        ("example.com", "anexample.com", False),
        ("gpu:11434", "gpu", True),
        ("gpu:80", "gpu", False),
        (" * ", "gpu", True),
        ("[::2]", "::2", True),
        (",,::,[,:,/", "gpu", False),
    ],
)
def test_no_proxy_is_read_as_go_reads_it(rules: str, host: str, spared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "proxy:3128")
    monkeypatch.setenv("NO_PROXY", rules)
    assert (proxy_of(Address(host)) is None) == spared


def test_certificates_that_are_given_are_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import certifi

    one = Path(certifi.where()).read_text(encoding="utf-8").partition("-----END CERTIFICATE-----")
    (tmp_path / "own.pem").write_text("".join(one[:2]) + "\n", encoding="utf-8")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    from distill.teacher.connection import _certificates

    found = _certificates(True, str(tmp_path / "own.pem"), "", "")
    assert (found.verify_mode, len(found.get_ca_certs())) == (ssl.CERT_REQUIRED, 1)
    nobody = _certificates(False, "/nowhere", "", "")
    assert (nobody.verify_mode, nobody.check_hostname, nobody.get_ca_certs()) == (ssl.CERT_REQUIRED, True, [])


@settings(max_examples=500, deadline=None)
@given(
    st.text(max_size=30)
    | st.text("abc:/@[]%.?#\\\"' 0123456789", max_size=30)
    | st.builds("http://u:secret{}@{}".format, st.text(max_size=8), st.text("ab.:1[]", max_size=12))
)
def test_fuzz_hosts_are_read_or_refused(text: str) -> None:
    try:
        address, told = Address(text), ""
    except BadInput as error:
        address, told = None, str(error)
    assert "secret" not in told
    if address is None:
        return
    url = httpx.URL(address.url)
    assert (url.scheme, url.port or {"http": 80, "https": 443}[url.scheme]) == (address.scheme, address.port)
    assert "secret" not in str(address)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=20), st.text(":/[].*,a1 ", max_size=20))
def test_fuzz_proxies_are_used_or_named(proxy: str, rules: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTP_PROXY", proxy.replace("\0", "").encode("utf-8", "ignore").decode())
        patch.setenv("NO_PROXY", rules)
        try:
            found = proxy_of(Address("gpu"))
            told = "" if found is None else found.told
        except BadInput as error:
            told = str(error)
        assert not told or told.startswith("HTTP_PROXY=")
