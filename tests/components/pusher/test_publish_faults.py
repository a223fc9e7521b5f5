"""Publishing to a bucket through faults at every request in turn, kills, and rivals: the old version or the new one."""

import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import faulty_storage
import killed_publisher
import pytest
from faulty_storage import REFUSALS, Answer, Fault, Request, at_request, refusal
from places import BASE, QUICK, bucket_behind, read, states, tree

from components.pusher import publish
from trainer_module.errors import UserError

pytestmark = pytest.mark.long

PREFIX = BASE.removeprefix("gs://models/") + "/"
# A fault that strikes once must be got over, whichever request it strikes.
PASSING = [fault for fault in Fault if fault not in REFUSALS]


def seed(storage: faulty_storage.Storage, model: Path) -> None:
    with faulty_storage.proxy(storage) as proxy:
        publish.publish(str(model), bucket_behind(proxy))


def seeded(model: Path) -> faulty_storage.Storage:
    """A bucket in which a model is in service, to be copied for each of many publications."""
    made = faulty_storage.Storage("models")
    seed(made, model)
    return made


def reader(storage: faulty_storage.Storage) -> dict[str, bytes]:
    with faulty_storage.proxy(storage) as proxy:
        return read(bucket_behind(proxy))


def publish_through(storage: faulty_storage.Storage, model: Path, plan: faulty_storage.Plan) -> list[Request]:
    """Publishes, and returns what was asked."""
    with faulty_storage.proxy(storage, plan) as proxy:
        publish.publish(str(model), bucket_behind(proxy))
        return proxy.requests


def applies(fault: Fault, request: Request) -> bool:
    if fault in (Fault.request_cut, Fault.flipped_upload):
        return request.is_upload
    if fault in (Fault.flipped_download, Fault.answer_slow):
        return request.is_download
    return True


def every_request(requests: list[Request], fault: Fault | None) -> list[int]:
    return [number for number, request in enumerate(requests) if fault is None or applies(fault, request)]


def leftovers(storage: faulty_storage.Storage) -> list[str]:
    """Objects that belong to no whole version."""
    names = [name.removeprefix(PREFIX) for name in storage.objects()]
    whole = {name.split("/")[0] for name in names if name.endswith("/saved_model.pb")}
    return [name for name in names if name != "latest.json" and name.split("/")[0] not in whole]


@pytest.mark.parametrize("fault", [*PASSING, None], ids=lambda fault: fault.name if fault else "refused")
def test_a_fault_at_any_request_is_got_over_and_readers_see_the_new_version(fault, make_model):
    before, new = seeded(make_model("old")), make_model("new")

    def check(number: int | None) -> list[Request]:
        storage = before.copy()
        strikes = fault or REFUSALS[(number or 0) % len(REFUSALS)]
        plan = faulty_storage.no_faults if number is None else at_request(number, strikes)
        requests = publish_through(storage, new, plan)
        assert reader(storage) == tree(new), f"{strikes} at request {number}"
        assert leftovers(storage) == [], f"{strikes} at request {number}"
        return requests

    undisturbed = check(None)
    assert len(undisturbed) > 10
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, every_request(undisturbed, fault)))


def test_files_are_uploaded_several_at_a_time(make_model):
    storage, model = faulty_storage.Storage("models"), make_model("new")
    begun, together = {""}, threading.Event()  # names of objects

    def plan(_: int, request: Request) -> None:
        if request.is_upload:
            begun.add(faulty_storage.name_of(request))
            if len(begun) > 3:  # nothing, the claim, and two files
                together.set()
            elif len(begun) == 3:
                found.append(together.wait(0.3))  # below the client's patience, which would send it once more

    found: list[bool] = []
    publish_through(storage, model, plan)
    assert reader(storage) == tree(model)
    assert together.is_set()
    assert all(found)


@pytest.mark.parametrize("fault", [Fault.request_lost, Fault.answer_lost, Fault.unavailable_after])
def test_an_outage_from_any_request_on_leaves_the_old_version_or_the_new_one(fault, make_model):
    old, new = make_model("old"), make_model("new")
    before, seen, told = seeded(old), set(), []
    undisturbed = publish_through(before.copy(), new, faulty_storage.no_faults)

    def check(first: int) -> None:
        storage = before.copy()
        with faulty_storage.proxy(storage, lambda number, _: fault if number >= first else None) as proxy:
            impatient = type(QUICK)(timeout=1.0, retry=QUICK.retry.with_timeout(0.3))
            try:
                publish.publish(str(new), bucket_behind(proxy, transfer=impatient))
            except UserError as error:
                told.append(str(error))
        got = reader(storage)
        assert got in (tree(old), tree(new))
        seen.add(got == tree(new))
        # The next run gets it done; what is left is taken for a living publisher's, since this process lives.
        publish_through(storage, new, faulty_storage.no_faults)
        assert reader(storage) == tree(new)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(len(undisturbed))))
    assert False in seen
    assert all("\n" not in words and BASE in words for words in told)


def test_readers_see_a_whole_version_between_any_two_requests(storage, make_model):
    old, new = make_model("old"), make_model("new")
    seed(storage, old)
    seen = []

    def look(number: int, request: Request) -> None:
        seen.append(reader(storage))

    publish_through(storage, new, look)
    seen.append(reader(storage))
    changes = [tree(old)] + [after for before, after in itertools.pairwise(seen) if after != before]
    assert changes == [tree(old), tree(new)]


def test_a_large_model_goes_in_pieces_and_a_fault_at_any_of_them_is_got_over(make_model):
    model = make_model("large", size=8 * 2**20 + 5)
    transfer = type(QUICK)(timeout=2.0, chunk=3 * 2**20, retry=QUICK.retry)

    def check(fault: Fault | None, number: int) -> list[Request]:
        storage = faulty_storage.Storage("models")
        with faulty_storage.proxy(storage, plan_of_pieces(fault, number)) as proxy:
            publish.publish(str(model), bucket_behind(proxy, transfer=transfer))
            requests = [request for request in proxy.requests if is_piece(request)]
        assert reader(storage) == tree(model), f"{fault} at piece {number}"
        return requests

    pieces = check(None, 0)
    assert len(pieces) == 4  # the start and three pieces
    faults = (Fault.request_cut, Fault.request_lost, Fault.answer_lost, Fault.unavailable, Fault.flipped_upload)
    cases = [(fault, number) for fault in faults for number in range(4) if (fault, number) != (Fault.flipped_upload, 0)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, *zip(*cases, strict=True)))


def is_piece(request: Request) -> bool:
    return request.query.get("uploadType") == "resumable"


def plan_of_pieces(fault: Fault | None, strikes: int) -> faulty_storage.Plan:
    """A fault at one of the requests of a resumable upload."""
    pieces = itertools.count()
    return lambda _, request: fault if is_piece(request) and next(pieces) == strikes else None


def test_what_is_read_through_a_fault_is_whole(storage, make_model):
    model = make_model("model", size=100_000)
    seed(storage, model)
    with faulty_storage.proxy(storage) as proxy:
        read(bucket_behind(proxy))
        requests = proxy.requests

    def check(case: tuple[int, Fault]) -> None:
        with faulty_storage.proxy(storage, at_request(*case)) as proxy:
            assert read(bucket_behind(proxy)) == tree(model), case

    faults = [Fault.request_lost, Fault.answer_cut, Fault.answer_slow, Fault.unavailable, Fault.flipped_download]
    with ThreadPoolExecutor(8) as pool:
        cases = [(number, fault) for fault in faults for number in every_request(requests, fault)]
        assert len(list(pool.map(check, cases))) > 30


# Kills.


class Publishers:
    """Processes that publish, one after the other."""

    def __init__(self) -> None:
        self._spawner = subprocess.Popen(
            [sys.executable, "-W", "ignore", killed_publisher.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )

    def start(self, model: Path, host: str, base: str = BASE) -> int:
        """Starts one and returns its number."""
        self._spawner.stdin.write(f"{model} {base} {host}\n")
        return int(self._spawner.stdout.readline())

    def wait(self) -> int:
        """Waits for its exit code."""
        return int(self._spawner.stdout.readline())

    def stop(self) -> None:
        self._spawner.stdin.close()
        self._spawner.wait(timeout=30)


@pytest.fixture(scope="module")
def publishers() -> Iterator[Publishers]:
    made = Publishers()
    yield made
    made.stop()


@pytest.mark.parametrize("acted_on", [False, True], ids=["before it is acted on", "before its answer"])
def test_a_kill_at_any_request_leaves_one_version_in_service_and_the_next_run_cleans_up(
    publishers, make_model, acted_on
):
    old, new = make_model("old"), make_model("new")
    before = seeded(old)
    killed = outcomes = 0
    for strikes in itertools.count():
        storage = before.copy()
        number: queue.Queue[int] = queue.Queue()

        def kill(current: int, request: Request, strikes=strikes, storage=storage, number=number) -> Fault | None:
            if current != strikes:
                return None
            if acted_on:
                storage.serve(request)
            os.kill(number.get(timeout=20), signal.SIGKILL)
            return Fault.request_lost

        with faulty_storage.proxy(storage, kill) as proxy:
            number.put(publishers.start(new, faulty_storage.url(proxy)))
            code = publishers.wait()
        got = reader(storage)
        assert got in (tree(old), tree(new))
        outcomes += got == tree(new)
        publish_through(storage, new, faulty_storage.no_faults)
        assert reader(storage) == tree(new)
        assert leftovers(storage) == []
        if code == 0:  # it had ended before that request
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed > 10
    assert 0 < outcomes < killed  # it was killed both before and after the change


def test_a_kill_in_the_midst_of_a_large_object_leaves_the_old_version(publishers, storage, make_model):
    old, new = make_model("old"), make_model("large", size=9 * 2**20)
    seed(storage, old)
    number: queue.Queue[int] = queue.Queue()

    def kill(current: int, request: Request) -> Fault | None:
        if not (is_piece(request) and request.method == "PUT"):
            return None
        os.kill(number.get(timeout=20), signal.SIGKILL)
        return Fault.request_cut

    with faulty_storage.proxy(storage, kill) as proxy:
        number.put(publishers.start(new, faulty_storage.url(proxy)))
        assert publishers.wait() == -signal.SIGKILL
    assert reader(storage) == tree(old)
    publish_through(storage, new, faulty_storage.no_faults)
    assert reader(storage) == tree(new)
    assert leftovers(storage) == []


def test_a_kill_at_any_time_leaves_one_version_in_service_in_a_directory_too(publishers, make_model, tmp_path):
    models = {word: make_model(word, size=4 * 2**20) for word in ("old", "new")}
    at = publish.place(str(tmp_path / "serving"))
    publish.publish(str(models["old"]), at)
    killed = 0
    for milliseconds in range(0, 30, 2):
        number = publishers.start(models["new"], "none", at.base)
        time.sleep(milliseconds / 1000)
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
        killed += publishers.wait() == -signal.SIGKILL
        assert read(at) in [tree(model) for model in models.values()]
    assert killed
    publish.publish(str(models["new"]), at)
    assert read(at) == tree(models["new"])
    assert all(name.isdecimal() or "latest" in name for name in os.listdir(at.base))


# Rivals.


def rivals(storage: faulty_storage.Storage, models: list[Path], plan: faulty_storage.Plan) -> Iterator[str]:
    """Publishes models at once; yields what became of each: "" or the refusal."""

    def one(model: Path) -> str:
        try:
            with faulty_storage.proxy(storage, plan) as proxy:
                publish.publish(str(model), bucket_behind(proxy))
        except UserError as refusal:
            return str(refusal)
        return ""

    with ThreadPoolExecutor(len(models)) as pool:
        yield from pool.map(one, models)


def meeting(count: int, at: Callable[[Request], bool]) -> faulty_storage.Plan:
    """All publishers wait for each other at a request, so that they are at it at the same time."""
    import threading

    barrier = threading.Barrier(count)

    def plan(number: int, request: Request) -> None:
        if at(request):
            barrier.wait(timeout=20)

    return plan


@pytest.mark.parametrize("count", [2, 4])
def test_of_publishers_at_once_one_wins_and_the_others_say_so_in_one_line(storage, make_model, count):
    seed(storage, make_model("old"))
    models = [make_model(f"rival{number}") for number in range(count)]

    def flips(request: Request) -> bool:
        return request.is_upload and b"latest.json" in request.body

    outcomes = list(rivals(storage, models, meeting(count, flips)))
    assert outcomes.count("") == 1
    losers = [outcome for outcome in outcomes if outcome]
    assert all("has put version" in refusal and "\n" not in refusal for refusal in losers)
    assert reader(storage) == tree(models[outcomes.index("")])
    with faulty_storage.proxy(storage) as proxy:
        assert states(bucket_behind(proxy)) == ["ready", "in service"]  # and nothing of the losers
    assert leftovers(storage) == []


def test_publishers_that_want_the_same_number_get_two(storage, make_model):
    models = [make_model(word) for word in ("one", "two")]
    list(rivals(storage, models, meeting(2, lambda request: request.is_upload and b".publishing" in request.body)))
    assert reader(storage) in [tree(model) for model in models]


def test_a_publisher_taken_for_dead_gives_up_and_never_serves_what_was_removed(storage, make_model):
    old, slow, new = (make_model(word) for word in ("old", "slow", "new"))
    seed(storage, old)

    def remove_it(number: int, request: Request) -> None:
        if request.is_upload and b"latest.json" in request.body and not removed:
            removed.append(True)
            with faulty_storage.proxy(storage) as other:
                at = bucket_behind(other)
                (claimed,) = [version.number for version in at.look().versions if version.claimed]
                at.update(lambda now: now.without([claimed]))
                at.remove([claimed])

    removed: list[bool] = []
    with pytest.raises(UserError, match="took this one for dead"):
        publish_through(storage, slow, remove_it)
    assert reader(storage) == tree(old)
    publish_through(storage, new, faulty_storage.no_faults)
    assert reader(storage) == tree(new)


def test_a_living_publishers_work_is_left_alone(storage, make_model):
    seed(storage, make_model("old"))
    slow, other = make_model("slow"), make_model("other")

    def meanwhile(number: int, request: Request) -> None:
        if request.is_upload and b"saved_model.pb" in request.body:
            before = set(storage.objects())
            publish_through(storage, other, faulty_storage.no_faults)
            assert before <= set(storage.objects())

    with pytest.raises(UserError, match="has put version"):
        publish_through(storage, slow, meanwhile)
    assert reader(storage) == tree(other)


# What a bucket may refuse.


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refusal(403, "forbidden", "x@y does not have storage.objects.create access"), "roles/storage.objectUser"),
        (refusal(401, "required", "Anonymous caller"), "log in"),
        (refusal(403, "retentionPolicyNotMet", "Object is subject to bucket's retention policy"), "a retention policy"),
        (refusal(404, "notFound", "The specified bucket does not exist."), "there is no bucket gs://models"),
        (refusal(503, "backendError", "Backend error"), "no answer from gs://models (503: Backend error)"),
        (refusal(429, "rateLimitExceeded", "Too many"), "no answer from gs://models (429: Too many)"),
    ],
)
@pytest.mark.parametrize("at", ["list", "claim", "flip"])
def test_a_refusal_of_the_bucket_is_one_line_and_leaves_the_old_version(storage, make_model, answer, words, at):
    old, new = make_model("old"), make_model("new")
    seed(storage, old)

    def plan(number: int, request: Request) -> Answer | None:
        flip = request.is_upload and b"latest.json" in request.body
        claim = request.is_upload and b".publishing" in request.body
        listing = "prefix" in request.query
        return answer if {"list": listing, "claim": claim, "flip": flip}[at] else None

    with faulty_storage.proxy(storage, plan) as proxy:
        impatient = type(QUICK)(timeout=1.0, retry=QUICK.retry.with_timeout(0.3))
        with pytest.raises(UserError) as caught:
            publish.publish(str(new), bucket_behind(proxy, transfer=impatient))
    said = str(caught.value)
    assert said.startswith(BASE)
    assert "\n" not in said
    assert words in said or (at == "flip" and "no answer whether version" in said)
    assert reader(storage) == tree(old)


@pytest.mark.parametrize("at", ["list", "claim", "upload", "flip"])
def test_any_other_refusal_is_one_line_with_the_services_words(storage, make_model, at):
    old = make_model("old")
    seed(storage, old)

    def struck(request: Request) -> bool:
        flip = request.is_upload and b"latest.json" in request.body
        claim = request.is_upload and b".publishing" in request.body
        upload = request.is_upload and not (flip or claim)
        return {"list": "prefix" in request.query, "claim": claim, "upload": upload, "flip": flip}[at]

    def refused(status: int) -> str:
        answer = refusal(status, "why", f"the words of {status}")
        with pytest.raises(UserError) as caught:
            publish_through(storage, make_model(f"new{status}"), lambda _, request: answer if struck(request) else None)
        return str(caught.value)

    statuses = (302, 400, 405, 409, 412, 413)
    with ThreadPoolExecutor(6) as pool:
        for status, said in zip(statuses, pool.map(refused, statuses), strict=True):
            assert said.startswith(f"{BASE}: gs://models refuses that ({status}: ")
            assert f"the words of {status}" in said
            assert "\n" not in said
    assert reader(storage) == tree(old)
    assert leftovers(storage) == []


@pytest.mark.parametrize("body", [b"[]", b"{}", b"<html>", b'{"items": [{}]}'])
def test_an_answer_that_is_not_the_services_is_told(storage, make_model, body):
    seed(storage, make_model("old"))
    answer = Answer(200, {"Content-Type": "application/json"}, body)
    with faulty_storage.proxy(storage, lambda *_: answer) as proxy:
        impatient = type(QUICK)(timeout=1.0, retry=QUICK.retry.with_timeout(0.3))
        with pytest.raises(UserError) as caught:
            publish.publish(str(make_model("new")), bucket_behind(proxy, transfer=impatient))
    assert str(caught.value).startswith(BASE)
    assert "\n" not in str(caught.value)


def test_an_upload_that_somebody_else_has_changed_never_comes_into_service(storage, make_model):
    old, new = make_model("old"), make_model("new")
    seed(storage, old)
    changed = []

    def change(number: int, request: Request) -> None:
        # The list that the uploaded objects are compared with.
        if request.query.get("prefix", "").rstrip("/").rpartition("/")[2].isdecimal() and not changed:
            changed.append(request.query["prefix"] + "variables/variables.data")
            with faulty_storage.proxy(storage) as other:
                bucket_behind(other)._bucket.blob(changed[0]).upload_from_string("by another")

    with pytest.raises(UserError, match="was changed by somebody else while it was uploaded"):
        publish_through(storage, new, change)
    assert changed
    assert reader(storage) == tree(old)
    assert leftovers(storage) == []


def test_a_line_over_which_bytes_go_up_slowly_is_fast_enough(storage, make_model):
    model = make_model("large", size=9 * 2**20)
    with faulty_storage.proxy(storage, slow=True) as proxy:
        publish.publish(str(model), bucket_behind(proxy, transfer=type(QUICK)(timeout=2.0, retry=QUICK.retry)))
    assert reader(storage) == tree(model)


def test_a_missing_bucket_and_a_network_that_is_gone_are_told(storage, proxy, make_model):
    with pytest.raises(UserError, match=r"there is no bucket gs://another \(404: .*; check the name"):
        publish.publish(str(make_model("x")), bucket_behind(proxy, "gs://another/x"))
    gone = bucket_behind(proxy, transfer=type(QUICK)(timeout=1.0, retry=QUICK.retry.with_timeout(0.3)))
    proxy.shutdown()
    proxy.server_close()
    with pytest.raises(UserError, match=r"no answer from gs://models .*check the network"):
        publish.versions(gone)


def test_without_the_right_to_delete_a_model_is_published_all_the_same(storage, make_model):
    seed(storage, make_model("old"))
    new = make_model("new")
    denied = refusal(403, "forbidden", "no storage.objects.delete access")
    publish_through(storage, new, lambda _, request: denied if request.method == "DELETE" else None)
    assert reader(storage) == tree(new)
