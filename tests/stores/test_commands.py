"""Commands and functions on real stores: the same bytes as on disk, whatever the network does."""

import json
import threading
import time

import numpy as np
import pytest
from proxy import first, proxy, some
from servers import ACCESS_KEY, SECRET_KEY

import shardstate
from checkpoints import flip_bit, tree, write_llama
from shardstate.cli.main import run
from shardstate.errors import DamageError, InputError, StorageError, TargetError
from shardstate.storage import Access, Reading

BIG = {"heads": 16, "kv_heads": 4, "head_dim": 32, "inner": 2048, "vocab": 8192, "layers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An ordinary checkpoint of 31 MB in two files."""
    return write_llama(tmp_path_factory.mktemp("source") / "llama", files=2, **BIG)


@pytest.fixture(scope="module")
def on_disk(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "tp4"
    shardstate.shard(source, out, tp=4)
    return out


@pytest.fixture(scope="module")
def stored(source, s3):
    """The same checkpoint in a bucket, brought there by hand."""
    upload(s3, source, "source")
    return "s3://bucket/source"


@pytest.fixture
def access(s3):
    return Access(timeout=10, options=s3.options)


def upload(server, folder, prefix):
    for name, data in tree(folder).items():
        if not name.endswith("/"):
            assert server.request("PUT", f"/bucket/{prefix}/{name}", data)[0] == 200


def objects(server, prefix):
    """Return the objects of a folder, past the client under test."""
    text = server.request("GET", f"/bucket?list-type=2&prefix={prefix}%2F")[1].decode()
    keys = [part.split("</Key>")[0] for part in text.split("<Key>")[1:]]
    return {
        key.removeprefix(f"{prefix}/"): server.request("GET", f"/bucket/{key}")[1]
        for key in keys
        if not key.endswith("/")
    }


def files(folder):
    return {name: data for name, data in tree(folder).items() if not name.endswith("/")}


def without_location(found, location):
    """Return files whose JSON names another source: digests follow from that."""
    return {name: data for name, data in found.items() if not name.startswith("shardstate")}


def flags(access):
    return [f"--store-option={key}={value}" for key, value in access.options.items()]


class TestTheSameBytes:
    def test_sharding_to_a_store(self, source, on_disk, s3, access, folder):
        report = shardstate.shard(source, f"s3://bucket/{folder}", tp=4, access=access)
        assert report.committed
        assert objects(s3, folder) == files(on_disk)
        assert s3.uploads() == []

    def test_sharding_from_a_store(self, stored, on_disk, access, tmp_path):
        shardstate.shard(stored, tmp_path / "tp4", tp=4, access=access)
        found, expected = files(tmp_path / "tp4"), files(on_disk)
        assert without_location(found, stored) == without_location(expected, None)
        manifest = json.loads(found["shardstate.json"])
        assert manifest["source"]["location"] == stored
        report = shardstate.verify(tmp_path / "tp4", against=stored, access=access)
        assert report.problems == ()

    def test_sharding_from_store_to_store_in_small_parts(self, stored, s3, access, folder):
        url = f"s3://bucket/{folder}"
        report = shardstate.shard(stored, url, tp=2, max_part_size="2MB", access=access)
        assert len(report.file_list) > 10
        assert shardstate.verify(url, full=True, access=access).problems == ()

    @pytest.mark.parametrize("rank", [0, 3])
    def test_loading_a_rank_of_a_set(self, s3, on_disk, access, folder, rank):
        upload(s3, on_disk, folder)
        found = shardstate.load(f"s3://bucket/{folder}", rank=rank, verify=True, access=access)
        same_arrays(found, shardstate.load(on_disk, rank=rank))

    def test_loading_a_rank_of_an_ordinary_checkpoint(self, stored, source, access):
        found = shardstate.load(stored, rank=1, tp=4, access=access)
        same_arrays(found, shardstate.load(source, rank=1, tp=4))

    def test_what_is_read_of_an_ordinary_checkpoint(self, s3, access, tmp_path, folder):
        """Column-parallel parts cost what they hold, as counted by the network itself."""
        rules = [{"match": "down_proj.weight", "replicate": True}, {"match": "*", "split": 0}]
        path = write_llama(tmp_path / "columns", **BIG | {"layers": 4})
        upload(s3, path, folder)
        with proxy(s3.port) as between:
            there = Access(timeout=10, options=access.options | {"endpoint": between.endpoint})
            report = shardstate.api.load_rank(
                f"s3://bucket/{folder}", rank=1, tp=4, rules=rules, access=there
            )[1]
            assert report.bytes_read <= 1.1 * report.bytes_wanted
            assert between.body_bytes <= 1.1 * report.bytes_wanted + (64 << 10)

    def test_other_stores(self, source, on_disk, azure, google, folder):
        token = {"base_url": google.endpoint, "bearer_token": "of the tests"}
        for url, options in (
            (f"az://bucket/{folder}", azure.options),
            (f"gs://open/{folder}", token),
        ):
            access = Access(timeout=10, options=options)
            shardstate.shard(source, url, tp=4, access=access)
            assert shardstate.verify(url, against=source, access=access).problems == ()
            same_arrays(
                shardstate.load(url, rank=2, verify=True, access=access),
                shardstate.load(on_disk, rank=2),
            )


def same_arrays(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert np.array_equal(found[name].view(np.uint8), array.view(np.uint8)), name


class TestReplacing:
    def test_another_set_needs_force(self, source, access, folder):
        url = f"s3://bucket/{folder}"
        shardstate.shard(source, url, tp=2, access=access)
        with pytest.raises(TargetError, match=r"for tp 2.*--force replaces it"):
            shardstate.shard(source, url, tp=4, access=access)
        shardstate.shard(source, url, tp=4, force=True, access=access)
        assert shardstate.verify(url, full=True, access=access).problems == ()
        assert shardstate.open(url, access=access).topology.tp == 4

    def test_a_reader_gets_the_old_set_the_new_one_or_an_error(
        self, source, s3, access, folder, tmp_path
    ):
        """Sets of two seeds replace each other all the time; nobody may see a mixture."""
        url = f"s3://bucket/{folder}"
        other = write_llama(tmp_path / "other", files=2, **BIG | {"seed": 1})
        sources = [source, other]
        expected = [
            {n: a.tobytes() for n, a in shardstate.load(path, rank=1, tp=2).items()}
            for path in sources
        ]
        shardstate.shard(source, url, tp=2, access=access)
        stopped = threading.Event()
        failures = []

        def replace():
            try:
                for turn in range(1, 7):
                    shardstate.shard(sources[turn % 2], url, tp=2, force=True, access=access)
            except Exception as error:
                failures.append(error)
            finally:
                stopped.set()

        writer = threading.Thread(target=replace)
        writer.start()
        whole = refused = 0
        give_up = time.monotonic() + 60
        while not stopped.is_set() and time.monotonic() < give_up:
            try:
                found = shardstate.load(url, rank=1, access=access)
            except InputError:
                refused += 1
                continue
            whole += 1
            assert {n: a.tobytes() for n, a in found.items()} in expected
        writer.join()
        assert failures == []
        assert refused
        assert whole + refused > 3
        found = shardstate.load(url, rank=1, access=access)
        assert {n: a.tobytes() for n, a in found.items()} == expected[0]

    def test_a_changed_object_is_an_error(self, s3, source, access, folder, tmp_path):
        upload(s3, source, folder)
        url = f"s3://bucket/{folder}"
        with shardstate.open(url, access=access) as checkpoint:
            name = checkpoint.catalog.files[0]
            data = bytearray(s3.request("GET", f"/bucket/{folder}/{name}")[1])
            data[-1] ^= 1
            s3.request("PUT", f"/bucket/{folder}/{name}", bytes(data))
            with pytest.raises(InputError, match="changed since it was opened"):
                checkpoint.storage.read_into(name, 0, [memoryview(bytearray(8))])
            s3.request("DELETE", f"/bucket/{folder}/{name}")
            with pytest.raises(InputError, match="changed since it was opened"):
                checkpoint.storage.read_into(name, 0, [memoryview(bytearray(8))])

    def test_an_interrupted_run_leaves_no_set_and_no_upload_and_goes_on(
        self, source, on_disk, s3, access, folder
    ):
        url = f"s3://bucket/{folder}"
        calls = 0

        def progress(done, total):
            nonlocal calls
            calls += 1
            if done:
                raise KeyboardInterrupt

        with proxy(s3.port, lambda _h, _n: time.sleep(0.02)) as between:
            slow = Access(timeout=10, options=access.options | {"endpoint": between.endpoint})
            with pytest.raises(KeyboardInterrupt):
                shardstate.shard(
                    source, url, tp=4, max_part_size="500kB", progress=progress, access=slow
                )
        assert calls
        assert "shardstate.json" not in objects(s3, folder)
        assert s3.uploads() == []
        shardstate.shard(source, url, tp=4, max_part_size="500kB", access=access)
        assert shardstate.verify(url, against=source, access=access).problems == ()
        assert not [name for name in objects(s3, folder) if name.startswith(".")]


class TestFailures:
    """Each failure has a text of its own, in time."""

    @pytest.fixture
    def url(self, s3, on_disk, folder):
        upload(s3, on_disk, folder)
        return f"s3://bucket/{folder}"

    def fails(self, url, options, *says, timeout=1.5, status=3, capsys=None):
        arguments = [f"--store-option={key}={value}" for key, value in options.items()]
        began = time.monotonic()
        found = run(["load", url, "--rank", "0", *arguments, "--timeout", str(timeout)])
        error = capsys.readouterr().err
        assert time.monotonic() - began < 3 * timeout + 3
        assert found == status, error
        assert len(error.splitlines()) == 1
        for words in says:
            assert words in error
        assert SECRET_KEY not in error
        return error

    def test_a_wrong_secret(self, url, access, capsys):
        options = access.options | {"secret_access_key": "wrong"}
        self.fails(url, options, "SignatureDoesNotMatch", "secret key", capsys=capsys)

    def test_a_wrong_key(self, url, access, capsys):
        options = access.options | {"access_key_id": "wrong"}
        self.fails(url, options, "InvalidAccessKeyId", "access key", capsys=capsys)

    def test_no_credentials(self, url, access, capsys):
        options = {"endpoint": access.options["endpoint"]}
        self.fails(url, options, "no credentials", "AWS_ACCESS_KEY_ID", capsys=capsys)

    def test_no_bucket(self, access, capsys):
        self.fails("s3://nobucket/a", access.options, "NoSuchBucket", capsys=capsys)

    def test_no_object(self, access, capsys):
        says = ["s3://bucket/nothing", "found nothing", "check the path"]
        self.fails("s3://bucket/nothing", access.options, *says, status=2, capsys=capsys)

    def test_a_wrong_region_or_clock(self, url, access, s3, capsys):
        with proxy(s3.port, lambda _head, _number: "skewed") as between:
            options = access.options | {"endpoint": between.endpoint}
            self.fails(url, options, "RequestTimeTooSkewed", "clock", capsys=capsys)

    def test_nobody_there(self, url, access, capsys):
        options = access.options | {"endpoint": "http://127.0.0.1:1"}
        error = self.fails(url, options, "connection refused", "tries", capsys=capsys)
        assert "http://127.0.0.1:1" in error

    def test_no_tls_there(self, url, access, capsys):
        options = access.options
        options = options | {"endpoint": options["endpoint"].replace("http:", "https:")}
        self.fails(url, options, "TLS failed", "https:// or http://", capsys=capsys)

    def test_an_unknown_host(self, url, access, capsys):
        options = access.options | {"endpoint": "http://no-such-host.invalid"}
        self.fails(url, options, "name of the host", capsys=capsys)

    @pytest.mark.parametrize(
        ("fate", "says"),
        [
            ("503", "HTTP 503"),
            ("429", "HTTP 429"),
            ("hang", "no answer in time"),
            ("stall", "no answer in time"),
            ("trickle", "trickles"),
            ("reset", "cut"),
        ],
    )
    def test_a_server_that_goes_bad_in_the_middle(self, url, s3, access, capsys, fate, says):
        def rule(head, _number):
            wide = b"model-rank" in head and b"bytes=0-7" not in head and b"bytes=8-" not in head
            return fate if wide and head.startswith(b"GET") else None

        with proxy(s3.port, rule) as between:
            options = access.options | {"endpoint": between.endpoint}
            error = self.fails(url, options, says, "read bytes [", "model-rank-0", capsys=capsys)
            assert "tries" in error
            assert between.endpoint in error

    @pytest.mark.parametrize("fate", ["503", "429", "cut", "reset", "hang", "stall"])
    def test_a_failure_that_passes_is_not_noticed(self, url, s3, access, on_disk, fate):
        with proxy(s3.port, first(2, fate, containing=b"model-rank")) as between:
            there = Access(timeout=3, options=access.options | {"endpoint": between.endpoint})
            found = shardstate.load(url, rank=0, verify=True, access=there)
            assert len(between.requests) > 6
        same_arrays(found, shardstate.load(on_disk, rank=0))

    def test_corruption_is_damage_where_one_verifies(self, url, s3, access):
        def rule(head, _number):
            wide = b"model-rank" in head and b"range: bytes=4096-" in head.lower()
            return "corrupt" if wide else None

        with proxy(s3.port, rule) as between:
            there = Access(timeout=2, options=access.options | {"endpoint": between.endpoint})
            with pytest.raises(DamageError, match="has digest"):
                shardstate.load(url, rank=0, verify=True, access=there)

    def test_many_failures_while_writing(self, source, on_disk, s3, access, folder):
        with proxy(s3.port, some(0.1, "503", "reset")) as between:
            there = Access(timeout=5, options=access.options | {"endpoint": between.endpoint})
            shardstate.shard(source, f"s3://bucket/{folder}", tp=4, access=there)
        assert objects(s3, folder) == files(on_disk)

    def test_a_server_that_is_gone_while_writing(self, source, s3, access, folder):
        with proxy(s3.port, lambda _head, n: "503" if n > 40 else None) as between:
            there = Access(timeout=1, options=access.options | {"endpoint": between.endpoint})
            with pytest.raises(StorageError, match="HTTP 503"):
                shardstate.shard(source, f"s3://bucket/{folder}", tp=4, access=there)
        assert "shardstate.json" not in objects(s3, folder)


class TestSecrets:
    def test_nothing_written_holds_a_secret(self, stored, s3, access, folder, tmp_path):
        shardstate.shard(stored, f"s3://bucket/{folder}", tp=2, access=access)
        shardstate.shard(stored, tmp_path / "out", tp=2, access=access)
        for found in (objects(s3, folder), files(tmp_path / "out")):
            for data in found.values():
                assert SECRET_KEY.encode() not in data
                assert ACCESS_KEY.encode() not in data

    def test_nothing_shown_holds_a_secret(self, stored, access, capsys, caplog):
        caplog.set_level("DEBUG")
        wrong = Access(options=access.options | {"endpoint": "http://u:hidden@127.0.0.1:1"})
        with shardstate.open(stored, access=access) as checkpoint:
            shown = repr(checkpoint) + repr(checkpoint.storage) + repr(access)
        arguments = ["inspect", stored, "--debug", "--timeout=0.3", *flags(wrong)]
        assert run(arguments) == 3
        out, err = capsys.readouterr()
        assert SECRET_KEY not in shown + out + err + caplog.text
        assert "hidden" not in shown + out + err + caplog.text


def test_verify_finds_damage_in_a_store(s3, on_disk, access, folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in files(on_disk).items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    flip_bit(copy / "model-rank-2-part-0.safetensors", 200_000)
    upload(s3, copy, folder)
    assert run(["verify", f"s3://bucket/{folder}", "--full", "--json", *flags(access)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(p["file"], p["kind"]) for p in report["problems"]] == [
        ("model-rank-2-part-0.safetensors", "digest")
    ]


def test_a_cache_serves_the_second_load(s3, on_disk, access, folder, tmp_path):
    upload(s3, on_disk, folder)
    with proxy(s3.port) as between:
        options = access.options | {"endpoint": between.endpoint}
        there = Access(timeout=10, options=options, cache=str(tmp_path / "cache"))
        url = f"s3://bucket/{folder}"
        expected = shardstate.load(url, rank=0, verify=True, access=there)
        between.body_bytes = 0
        found = shardstate.load(url, rank=0, verify=True, access=there)
        assert between.body_bytes < 64 << 10  # the listing
    same_arrays(found, expected)


def test_opening_a_rank_asks_once_for_each_file(s3, source, access, folder, tmp_path):
    shardstate.shard(source, tmp_path / "set", tp=1, max_part_size="5MB")
    upload(s3, tmp_path / "set", folder)
    with proxy(s3.port) as between:
        there = Access(timeout=10, options=access.options | {"endpoint": between.endpoint})
        with shardstate.open(f"s3://bucket/{folder}", access=there) as checkpoint:
            parts = checkpoint.rank_catalog(0).files
        assert len(parts) > 3
        assert len(between.requests) == len(["the listing", "manifest", "record", *parts])


def test_the_caller_decides_how_a_store_is_asked(s3, on_disk, access, folder):
    upload(s3, on_disk, folder)
    with proxy(s3.port) as between:
        options = access.options | {"endpoint": between.endpoint}
        there = Access(options=options, reading=Reading(threads=2, chunk_bytes=64 << 10))
        found = shardstate.load(f"s3://bucket/{folder}", rank=1, access=there)
        nbytes = sum(array.nbytes for array in found.values())
        assert nbytes / (64 << 10) <= len(between.requests) < 2 * nbytes / (64 << 10)
    same_arrays(found, shardstate.load(on_disk, rank=1))


def test_bench_measures_a_store(s3, on_disk, access, folder, capsys, tmp_path):
    upload(s3, on_disk, folder)
    picture = tmp_path / "bench.svg"
    more = ["--rounds", "2", "--plot", str(picture), *flags(access)]
    assert run(["bench", f"s3://bucket/{folder}", *more, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [each["name"] for each in report["measured"]]
    assert names[0] == "shardstate"
    assert "raw requests 8 × 8 MiB" in names
    assert {each["state"] for each in report["measured"]} == {"remote"}
    assert report["notes"][0].startswith("remote: ")
    assert "raw requests" in picture.read_text()
    assert run(["bench", f"s3://bucket/{folder}", *more]) == 0
    assert "of the best raw setting here" in capsys.readouterr().out
    assert run(["bench", f"s3://bucket/{folder}", *more, "--cache", str(tmp_path / "c")]) == 2
    assert "leave the cache out" in capsys.readouterr().err


@pytest.mark.parametrize(("delay", "threads"), [(0.0, {8, 16}), (0.05, {32})])
def test_a_store_that_is_far_away_is_asked_for_more_at_once(s3, stored, access, delay, threads):
    with proxy(s3.port, lambda _head, _number: time.sleep(delay)) as between:
        there = Access(timeout=10, options=access.options | {"endpoint": between.endpoint})
        with shardstate.open(stored, access=there) as checkpoint:
            assert checkpoint.storage.traits.read_threads in threads
