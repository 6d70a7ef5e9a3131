"""Every storage passes the contract of local directories, against a real server."""

import pytest

from shardstate.errors import UsageError
from shardstate.storage import Access, storage_at, writable_at
from test_storage import StorageContract


class StoreContract(StorageContract):
    """Subclasses give `server` and `url`, and `put` and `get` by requests of their own."""

    @pytest.fixture(autouse=True)
    def _place(self, server, folder):
        self.server, self.folder = server, folder

    @pytest.fixture
    def access(self, server):
        return Access(timeout=10, options=server.options)

    @pytest.fixture
    def storage(self, access):
        storage = writable_at(self.url, access, outputs=2)
        yield storage
        storage.close()

    def test_a_large_output_goes_up_in_parts(self, storage):
        data = bytes(range(256)) * (80 << 10)  # 20 MiB
        output = storage.create("large", len(data))
        step = 3 << 20
        for begin in sorted(range(0, len(data), step), key=lambda begin: (begin // step) ^ 1):
            output.write(begin, [memoryview(data)[begin : begin + step]])
        assert storage.entries() == {}
        output.publish()
        assert self.get("large") == data

    def test_what_lies_beside_the_folder_is_not_seen(self, storage):
        self.put("a", b"1")
        self.put(f"../{self.folder}-other/b", b"1")
        assert list(storage.entries()) == ["a"]

    def test_mapping_is_refused(self, storage):
        self.put("a", b"1")
        with pytest.raises(UsageError, match="only files on a local disk can be mapped"):
            storage.map("a")

    def test_a_reader_cannot_write(self, access):
        with pytest.raises(UsageError, match="opened for reading only"):
            storage_at(self.url, access).put("a", b"1")


class TestS3(StoreContract):
    @pytest.fixture
    def server(self, s3):
        return s3

    @property
    def url(self):
        return f"s3://bucket/{self.folder}"

    def path(self, name):
        return f"/bucket/{self.folder}/{name}".replace(f"{self.folder}/../", "")

    def put(self, name, data):
        assert self.server.request("PUT", self.path(name), data)[0] == 200

    def get(self, name):
        return self.server.request("GET", self.path(name))[1]

    def test_a_discarded_upload_is_aborted(self, storage):
        output = storage.create("large", 40 << 20)
        output.write(0, [memoryview(bytes(30 << 20))])
        output.discard()
        assert storage.entries() == {}
        assert self.server.uploads() == []


class TestGoogle(TestS3):
    @pytest.fixture
    def access(self, google):
        options = {"base_url": google.endpoint, "bearer_token": "of the tests"}
        return Access(timeout=10, options=options)

    @property
    def url(self):
        return f"gs://open/{self.folder}"

    def path(self, name):
        return super().path(name).replace("/bucket/", "/open/")

    def test_the_emulator_of_the_environment_is_used(self, google, monkeypatch):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.endpoint)
        self.put("a", b"1")
        storage = storage_at(self.url, Access(timeout=10))
        assert storage.read("a", limit=1) == b"1"


class TestAzure(StoreContract):
    @pytest.fixture
    def server(self, azure):
        return azure

    @property
    def url(self):
        return f"az://bucket/{self.folder}"

    def path(self, name):
        return f"/bucket/{self.folder}/{name}".replace(f"{self.folder}/../", "")

    def put(self, name, data):
        headers = {"x-ms-blob-type": "BlockBlob"}
        status, body = self.server.request("PUT", self.path(name), data, headers)
        assert status == 201, body

    def get(self, name):
        return self.server.request("GET", self.path(name))[1]
