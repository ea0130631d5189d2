"""The image and the compose file, as far as no Docker is needed: what they copy and call exists; nothing is root's."""

import re
import shlex
from pathlib import Path

import yaml
from click.testing import CliRunner

from cli.main import dream

HERE = Path(__file__).parents[1]
DOCKERFILE = (HERE / "docker" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((HERE / "docker" / "compose.yaml").read_text(encoding="utf-8"))


def test_the_image_copies_all_that_the_package_holds() -> None:
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for word in shlex.split(line)}
    pyproject = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"^packages = \[(.+)\]", pyproject, re.M)
    assert packages
    included = re.findall(r'^"(\w+)" = "\w+/\w+"', pyproject, re.M)
    assert included
    assert copied >= {*re.findall(r'"(\w+)"', packages[1]), *included, "constraints.txt", "pyproject.toml"}
    for name in copied:
        assert (HERE / name).exists(), name
    admitted = (HERE / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in admitted if line.startswith("!")} == copied
    assert "*" in admitted


def test_the_image_runs_as_nobody_special_and_is_pinned() -> None:
    assert re.findall(r"^USER (\d+)$", DOCKERFILE, re.M)[-1] != "0"
    for image in re.findall(r"^FROM (\S+)", DOCKERFILE, re.M):
        assert re.fullmatch(r"[\w/]+:3\.\d+-\S+", image), image
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+", COMPOSE["services"]["ollama"]["image"])
    assert 'ENTRYPOINT ["dream"]' in DOCKERFILE


def test_services_are_asked_whether_they_are_well_and_call_what_there_is() -> None:
    serve = COMPOSE["services"]["serve"]
    assert serve["ports"] == ["127.0.0.1:11435:11435"]
    assert all("healthcheck" in COMPOSE["services"][name] for name in ("ollama", "serve"))
    compile(serve["healthcheck"]["test"][-1], "healthcheck", "exec")
    command = [word.replace("${STUDENT:-my-student}", "nowhere") for word in serve["command"]]
    told = CliRunner().invoke(dream, command, env={"DREAM_TOKEN": ""}, prog_name="dream")
    assert "--token" in str(told.exception), "beyond this machine without a token"
    assert dream.main([command[0], "--help"], standalone_mode=False) == 0
