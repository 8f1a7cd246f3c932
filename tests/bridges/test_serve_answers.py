"""Good requests to the server, on the model in process."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bridge_media import ask, data_url, image_part, text_part, video_part

import tokensieve
from tokensieve.prompt import build_prompt
from tokensieve.video import read_clip


def direct(loaded: tuple[Any, Any], path: Path, method: str, retention: float, question: str = "What moves?") -> str:
    """The answer of the library without a server."""
    model, processor = loaded
    inputs = build_prompt(processor, read_clip(path, 4), question).on(model)
    with tokensieve.compress(model, method, retention=retention):
        produced = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return str(processor.tokenizer.decode(produced[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def events(text: str) -> list[dict[str, Any]]:
    """Events of a stream, which must end with the mark that it is complete."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(("method", "retention"), [("vidcom2", 0.25), ("uniform", 0.5), ("fastv", 0.3)])
def test_the_answer_is_that_of_the_library(
    post: Callable[..., Any], loaded: tuple[Any, Any], video: Path, method: str, retention: float
) -> None:
    response = post(ask(video_part(data_url(video))), method=method, retention=retention)
    assert response.status_code == 200, response.text
    found = response.json()
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": direct(loaded, video, method, retention)}
    assert (choice["finish_reason"], found["object"], found["model"]) == ("length", "chat.completion", "tiny")
    account, usage = found["tokensieve"], found["usage"]
    assert (account["method"], account["retention"], account["visual_before"]) == (method, retention, 100)
    assert account["visual_last"] < 60
    assert account["prompt_before"] - account["prompt"] == 100 - account["visual"]
    assert usage == {"prompt_tokens": account["prompt"], "completion_tokens": 6, "total_tokens": account["prompt"] + 6}
    stages = {"gate", "media", "prepare", "queue", "encode", "compress", "prefill", "decode"}
    assert set(account["seconds"]) == stages
    assert all(account["seconds"][stage] > 0 for stage in stages - {"gate", "queue"})


def test_a_stream_holds_the_same_text(serving: Callable[..., Any], video: Path) -> None:
    async def work(client: Any) -> Any:
        body = ask(video_part(data_url(video)))
        whole = await client.post("/v1/chat/completions", json=body)
        streamed = await client.post(
            "/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
        )
        return whole.json(), streamed

    whole, streamed = serving(work)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    first, *pieces, last, usage = events(streamed.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert text == whole["choices"][0]["message"]["content"] and len(pieces) > 1
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["tokensieve"]["visual"] == whole["tokensieve"]["visual"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert {event["object"] for event in (first, *pieces, last, usage)} == {"chat.completion.chunk"}
    assert len({event["id"] for event in (first, *pieces, last, usage)}) == 1


def test_requests_choose_inside_of_the_limits(serving: Callable[..., Any], video: Path) -> None:
    part = video_part(data_url(video))

    async def work(client: Any) -> Any:
        choices = [{}, {"retention": 0.1}, {"method": "none"}, {"method": "uniform", "retention": 0.5}, {"frames": 2}]
        answers = [await client.post("/v1/chat/completions", json=ask(part, **choice)) for choice in choices]
        return [answer.json()["tokensieve"] for answer in answers]

    default, small, none, uniform, short = serving(work, allowed_methods=("none", "unif*"), max_retention=0.5)
    assert default["visual"] > small["visual"]
    assert (none["visual"], uniform["visual"], short["visual_before"]) == (100, 50, 50)


def test_several_clips_turns_and_roles(
    serving: Callable[..., Any], video: Path, other_video: Path, picture: Path
) -> None:
    seen, image = video_part(data_url(video)), image_part(data_url(picture, "image/png"))

    async def work(client: Any) -> Any:
        two = ask(seen, text_part("and"), video_part(data_url(other_video)))
        mixed = ask(image, seen)
        turns = ask(seen)
        turns["messages"] = [
            {"role": "developer", "content": "Be brief."},
            *turns["messages"],
            {"role": "assistant", "content": "A square."},
            {"role": "user", "content": "Where to?"},
        ]
        plain = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        answers = [await client.post("/v1/chat/completions", json=body) for body in (two, mixed, turns, plain)]
        return [answer.json()["tokensieve"] for answer in answers]

    two, mixed, turns, plain = serving(work, method="uniform", retention=0.5)
    assert (two["visual_before"], two["visual"]) == (200, 100)
    assert mixed["visual_before"] > 100 and mixed["visual"] < mixed["visual_before"]
    assert (turns["visual_before"], turns["visual"]) == (100, 50)
    assert plain["visual_before"] == 0 and plain["prompt"] == plain["prompt_before"] > 0


def test_greedy_seeded_and_stopped(serving: Callable[..., Any], video: Path) -> None:
    part = video_part(data_url(video))

    async def work(client: Any) -> Any:
        async def text(**fields: Any) -> tuple[str, str, int]:
            found = (await client.post("/v1/chat/completions", json=ask(part, **fields))).json()
            choice = found["choices"][0]
            return choice["message"]["content"], choice["finish_reason"], found["usage"]["completion_tokens"]

        greedy = await text()
        assert await text(temperature=0) == greedy
        drawn = [await text(temperature=1.5, seed=seed) for seed in (1, 1, 2)]
        word = greedy[0][len(greedy[0]) // 2 :]
        return greedy, drawn, word, await text(stop=[word]), await text(stop="never met")

    greedy, drawn, word, stopped, unstopped = serving(work)
    assert drawn[0] == drawn[1] != drawn[2]
    assert stopped[0] == greedy[0][: greedy[0].index(word)] and stopped[1] == "stop"
    assert unstopped == greedy and greedy[1] == "length"


def test_files_under_the_root(post: Callable[..., Any], video: Path, folder: Path) -> None:
    for url in (
        video.as_uri(),
        video.as_uri().replace("file://", "file://localhost"),
        f"file://{folder}/../{folder.name}/{video.name}",
    ):
        response = post(ask(video_part(url)), media=_media(root=folder))
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "name", ["nasa_two_video_streams.mp4", "cartoon_pigs.gif", "bunny_h263_176x144.3gp", "bunny_square_vp9_642.webm"]
)
def test_real_clips(post: Callable[..., Any], real_videos: Path, name: str) -> None:
    response = post(ask(video_part((real_videos / name).as_uri())), media=_media(root=real_videos))
    assert response.status_code == 200, response.text
    account = response.json()["tokensieve"]
    assert account["visual_before"] == 100 and 20 <= account["visual"] <= 30


def test_fetched_videos_leave_nothing(serving: Callable[..., Any], video: Path, picture: Path, scratch: Path) -> None:
    from http_files import serve_folder

    async def work(client: Any) -> Any:
        with serve_folder(video.parent) as address:
            bodies = [ask(video_part(f"{address}/{video.name}")), ask(image_part(f"{address}/{picture.name}"))]
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

    answers = serving(work, media=_media(allow_http=True, allow_private=True))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert list(scratch.iterdir()) == []


def test_models_health_and_metrics(serving: Callable[..., Any], video: Path) -> None:
    async def work(client: Any) -> Any:
        for body in (ask(video_part(data_url(video))), {"messages": []}):
            await client.post("/v1/chat/completions", json=body)
        found = [await client.get(path) for path in ("/health", "/v1/models", "/metrics", "/nowhere")]
        client.app.state.service.backend.stop()
        return [*found, await client.get("/health"), await client.post("/v1/chat/completions", json=ask())]

    health, models, metrics, nowhere, down, late = serving(work, allowed_methods=("none",))
    assert health.json() == {"status": "ok", "backend": "transformers"}
    (model,) = models.json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert model["tokensieve"]["methods"] == ["vidcom2", "none"] and model["tokensieve"]["random_weights"] is False
    assert nowhere.status_code == 404 and "/nowhere is not offered" in nowhere.json()["error"]["message"]
    lines = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert float(lines['tokensieve_requests_total{outcome="ok"}']) == 1
    assert float(lines['tokensieve_requests_total{outcome="bad_request"}']) == 1
    assert float(lines['tokensieve_visual_tokens_before_total{method="vidcom2"}']) == 100
    assert 0 < float(lines['tokensieve_visual_tokens_after_total{method="vidcom2"}']) < 30
    assert float(lines['tokensieve_stage_seconds_sum{stage="prefill"}']) > 0
    assert float(lines["tokensieve_time_to_first_token_seconds_count"]) == 1
    assert float(lines["tokensieve_requests_running"]) == float(lines["tokensieve_requests_waiting"]) == 0
    assert down.status_code == 503 and late.status_code == 503


def _media(**options: Any) -> Any:
    from tokensieve.bridges.openai_server import MediaLimits

    return MediaLimits(**options)


def test_all_metrics_are_documented() -> None:
    from tokensieve.bridges.openai_server.metrics import Metrics

    lines = Metrics().render().decode().splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(tokensieve_\w+)`", page, re.MULTILINE))
    assert documented == {name for name in names if not name.endswith("_created")}
