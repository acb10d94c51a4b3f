"""Settings: what is read from where, who wins, and that every wrong one is named with its cure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastkin import settings
from fastkin.config import MIB, Broker, Kinesis, Pipeline, Settings, Workers
from fastkin.errors import ConfigError
from fastkin.formats import partition_key as keys
from fastkin.settings import SettingsError, envfile, load_settings, tables
from fastkin.settings.reload import Reader
from fastkin.settings.show import effective

ARN = "arn:aws:kinesis:eu-west-1:123456789012:stream/welders"
SMALL = '[[pipeline]]\nid = "a"\ntopics = ["t/#"]\nstream = "s"\ndead_letter = "none"\n'
CLIENT = '[broker]\nclient_id = "c"\n'
PEM = "".join(f"-----BEGIN {what}-----\nAAAA\n-----END {what}-----\n" for what in ("CERTIFICATE", "PRIVATE KEY"))
GOOD_KEY = Path(__file__).resolve().parent.parent / "wrong_settings" / "good.key"
MICRO = {"BROKER": "h", "TOPIC": "t/#", "KIN_STREAM_NAME": "s", "CLIENTID": "c"}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read(text: str, env: dict[str, str] | None = None, **more: Any) -> Settings:
        path = tmp_path / "fastkin.toml"
        path.write_text(text)
        return settings.load(path, env=env or {}, **more)

    return read


def env_only(env: dict[str, str], **more: Any) -> Settings:
    return settings.load(env=env, **more)


def problems(call: Any, *args: Any, **more: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        call(*args, **more)
    assert isinstance(caught.value, ConfigError)
    lines = [str(each) for each in caught.value.problems]
    assert str(caught.value) == "\n".join(lines)
    assert all("\n" not in line for line in lines)
    return lines


# --- TOML ---


def test_the_smallest_file_gives_the_defaults(read: Any) -> None:
    made = read(CLIENT + SMALL)
    assert made.broker == Broker(client_id="c")
    (pipeline,) = made.pipelines
    assert pipeline == Pipeline(id="a", topics=("t/#",), kinesis=pipeline.kinesis, dead_letter="none")
    assert pipeline.kinesis.stream == "s"
    assert made.warnings == ()


def test_every_key_of_every_table_is_read(read: Any, tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text(PEM)
    made = read(
        f"""
        [broker]
        scheme = "wss"
        host = "b.example"
        port = 444
        path = "/m"
        user = "u"
        password = "p"
        client_id = "c"
        protocol = "3.1.1"
        clean_session = true
        session_expiry_s = 10
        keep_alive_s = 6
        receive_maximum = 7
        inflight = 8
        max_packet_bytes = 9000
        topic_alias_maximum = 3
        connect_timeout_s = 1
        reconnect_min_s = 0.25
        reconnect_max_s = 5
        coalesce_ms = 0
        retain_handling = "never"
        [broker.tls]
        ca = "{pem}"
        cert = "{pem}"
        key = "{pem}"
        key_password = "k"
        alpn = ["x-amzn-mqtt-ca"]
        insecure_skip_verify = false
        [kinesis]
        region = "eu-west-1"
        endpoint_url = "https://vpce.example"
        access_key = "AK"
        secret_key = "SK"
        session_token = "ST"
        role_arn = "arn:aws:iam::123456789012:role/x/y"
        external_id = "ext"
        session_name = "sn"
        transport = "sdk"
        max_connections = 256
        connect_timeout_s = 2
        request_timeout_s = 3.5
        ca_bundle = "{pem}"
        [[pipeline]]
        id = "a"
        description = "d"
        enabled = false
        topics = ["a/+", "$share/g/b/#"]
        bulk_label = "telemetry"
        events = ["start", "stop"]
        exclude = ["a/9"]
        qos = 2
        format = "raw"
        stream = "s"
        enrich = true
        homes = ["7=12"]
        topic_field = "topic"
        topic_clash = "keep"
        topic_others = "wrap"
        envelope = "spark"
        envelope_host = "h"
        separator = "\\n"
        partition_key = "topic:1"
        aggregation = "kpl"
        linger_ms = 1.5
        max_records = 400
        max_batch_bytes = 4000000
        max_record_bytes = 200000
        budget_bytes = 10000000
        budget_records = 1000
        on_full = "spool"
        spool = "{tmp_path}/spool.db"
        spool_max_bytes = 5000000
        spool_after_s = 1.5
        throttle_error_after_s = 30
        dead_letter = "{tmp_path}/dead.jsonl"
        dead_letter_max_bytes = 1000000
        dead_letter_keep = 2
        startup_check = "none"
        shutdown_timeout_s = 1
        stdout = true
        file_prefix = "data/%Y/"
        file_error_prefix = "error/"
        file_raw_prefix = "raw/"
        file_extension = ".csv"
        file_compression = "none"
        file_interval_s = 300
        file_max_bytes = 1000000
        file_disk_bytes = 100000000
        """
    )
    given = set(tables.BROKER_KEYS) | set(tables.KINESIS_KEYS) | set(tables.PIPELINE_KEYS)
    default = Pipeline(id="", kinesis=Kinesis())
    (pipeline,) = made.pipelines
    assert pipeline.topics == ("a/+", "$share/g/b/#", "/devices/+/bulkData/telemetry")
    assert made.broker.tls.alpn == ("x-amzn-mqtt-ca",)
    # everything differs from its default, so everything was taken from the file
    untouched = {
        name
        for table, names, plain in (
            (made.broker, tables.BROKER_KEYS, Broker()),
            (pipeline, tables.PIPELINE_KEYS, default),
            (pipeline.kinesis, tables.KINESIS_KEYS, Kinesis()),
        )
        for name in names
        if name != "url" and getattr(table, name) == getattr(plain, name)
    }
    assert untouched == {"format", "stream_arn", "firehose", "profile", "file", "s3"}
    assert given  # the tables are what the loop above went through


def test_kinesis_holds_the_defaults_of_all_pipelines(read: Any) -> None:
    made = read(
        CLIENT
        + """
        [kinesis]
        stream = "common"
        region = "eu-west-1"
        max_connections = 3
        [[pipeline]]
        id = "a"
        topics = ["a"]
        [[pipeline]]
        id = "b"
        topics = "b"
        stream = "own"
        region = "us-east-1"
        max_connections = 9
        """
    )
    a, b = (pipeline.kinesis for pipeline in made.pipelines)
    assert (a.stream, a.region, a.max_connections) == ("common", "eu-west-1", 3)
    assert (b.stream, b.region, b.max_connections) == ("own", "us-east-1", 9)


def test_the_aliases_of_the_reference_systems(read: Any) -> None:
    made = read(
        CLIENT
        + """
        [kinesis]
        accessKeyId = "AK"
        secretAccessKey = "SK"
        region = "eu-west-1"
        kinesisStreamName = "s"
        [[pipeline]]
        id = "a"
        topics = ["a"]
        """
    )
    (pipeline,) = made.pipelines
    kinesis = pipeline.kinesis
    assert (kinesis.access_key, kinesis.secret_key, kinesis.stream) == ("AK", "SK", "s")


def test_an_alias_beside_its_key_is_an_error(read: Any) -> None:
    (line,) = problems(read, CLIENT + SMALL + 'stream_name = "t"\n')
    assert "sets stream a second time" in line


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[brokr]\nhost = "x"\n', "did you mean broker?"),
        ("[broker]\nkeepalive = 3\n", "did you mean keep_alive_s?"),
        ('[broker]\nclient-id = "x"\n', "did you mean client_id?"),
        ('[broker]\ntopics = ["x"]\n', "it belongs into [[pipeline]]"),
        ('[broker.tls]\nkeyfile = "x"\n', "known are ca, cert, key"),
        ('[kinesis]\nstreamname = "x"\n', "did you mean stream?"),
        ("[kinesis]\nqos = 1\n", "it belongs into [[pipeline]]"),
        ("[[pipeline]]\npartitionkey = 'uuid'\n", "did you mean partition_key?"),
        ("[[pipeline]]\nbroker = 'uuid'\n", "README"),
    ],
)
def test_unknown_keys_name_the_nearest_one(read: Any, text: str, wanted: str) -> None:
    lines = problems(read, text + SMALL)
    assert any(wanted in line and "fastkin.toml" in line for line in lines), lines


@pytest.mark.parametrize("said", ["\\n", "\n"])
def test_a_separator_may_be_escaped_in_the_environment(read: Any, said: str) -> None:
    made = read(CLIENT + SMALL, env={"FASTKIN_PIPELINE_SEPARATOR": said})
    assert made.pipelines[0].separator == "\n"


def test_events_alone_stand_for_the_filter_of_events(read: Any) -> None:
    """MD-02, MD-05: events, a bulk label, both, or topics of one's own."""
    whole = SMALL.replace('topics = ["t/#"]\n', "")

    def made(lines: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        (pipeline,) = read(CLIENT + whole + lines).pipelines
        return pipeline.topics, pipeline.formats

    event, label = "/devices/+/event", "/devices/+/bulkData/x"
    assert made('events = ["a"]\n') == ((event,), ((event, "raw"),))
    assert made('bulk_label = "x"\n') == ((label,), ((label, "bulk"),))
    assert made('events = ["a"]\nbulk_label = "x"\n') == ((event, label), ((label, "bulk"), (event, "raw")))
    assert made('events = ["a"]\ntopics = ["e/#"]\n')[0] == ("e/#",)


@pytest.mark.parametrize(
    ("said", "wanted"), [('["a", "b"]', ("a", "b")), ('["*"]', ()), ('["a", "*", "b"]', ()), ('"a"', ("a",))]
)
def test_a_star_among_the_events_wants_all(read: Any, said: str, wanted: tuple[str, ...]) -> None:
    """MD-03."""
    assert read(CLIENT + SMALL + f"events = {said}\n").pipelines[0].wanted == wanted


def test_no_events_at_all_is_a_mistake(read: Any) -> None:
    (line,) = problems(read, CLIENT + SMALL + "events = []\n")
    assert "key 'events': is empty" in line


@pytest.mark.parametrize("homes", ['["7"]', '["x=1"]', '["7=1", "8=y"]', '["7=1.5"]'])
def test_homes_are_numbers_of_devices_and_homes(read: Any, homes: str) -> None:
    (line,) = problems(read, CLIENT + SMALL + f'format = "event"\nenrich = true\nhomes = {homes}\n')
    assert "is not DEVICE=HOME" in line


def test_what_belongs_to_events_is_told_elsewhere(read: Any) -> None:
    made = read(CLIENT + SMALL + 'enrich = true\nhomes = ["7=1"]\n')
    assert sum('not used without format = "event"' in line for line in made.warnings) == 2


def test_words_about_the_topic_without_a_topic_field_are_told(read: Any) -> None:
    made = read(CLIENT + SMALL + 'topic_clash = "keep"\n')
    assert any("topic_clash" in line and "not used without topic_field" in line for line in made.warnings)


def test_a_delivery_stream_stands_in_the_place_of_a_stream(read: Any) -> None:
    """IC-08: the nearer of the two counts; its records end with a line feed when nothing else is said (IC-06)."""
    shared = CLIENT + '[kinesis]\nregion = "eu-west-1"\nstream = "common"\n'
    pipeline = '[[pipeline]]\nid = "a"\ntopics = ["a"]\ndead_letter = "none"\n'
    (made,) = read(shared + pipeline + 'firehose = "f"\n').pipelines
    assert (made.kinesis.firehose, made.kinesis.stream, made.kinesis.name, made.kinesis.target) == ("f", None, "f", "f")
    assert made.separator == "\n"
    (plain,) = read(shared + pipeline).pipelines
    assert (plain.kinesis.firehose, plain.kinesis.name, plain.separator) == (None, "common", "")
    (none,) = read(shared + pipeline + 'firehose = "f"\nseparator = ""\n').pipelines
    assert none.separator == ""
    again = read(effective(read(shared + pipeline + 'firehose = "f"\n')))
    assert again.pipelines == (made,)
    assert not any("Firehose" in line for line in again.warnings)


def test_firehose_by_the_environment(read: Any) -> None:
    env = {
        "BROKER": "b.example", "CLIENTID": "c", "TOPIC": "a", "FASTKIN_KINESIS_FIREHOSE": "f",
        "AWS_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL_KINESIS": "http://localhost:1", "AWS_ENDPOINT_URL_FIREHOSE": "http://localhost:2",
    }  # fmt: skip
    (made,) = load_settings(env=env).pipelines
    assert (made.kinesis.firehose, made.kinesis.endpoint_url) == ("f", "http://localhost:2")
    del env["AWS_ENDPOINT_URL_FIREHOSE"]
    (made,) = load_settings(env=env).pipelines
    assert made.kinesis.endpoint_url is None


def test_files_stand_in_the_place_of_a_stream(read: Any, tmp_path: Path) -> None:
    """IC-09, IC-10: a directory, and a bucket for what is finished there."""
    made = read(
        CLIENT
        + f"""
        [kinesis]
        region = "eu-west-1"
        stream = "common"
        [[pipeline]]
        id = "a"
        topics = ["a"]
        file = "{tmp_path}"
        s3 = "plant"
        file_prefix = "prod/data/"
        file_error_prefix = "prod/error/"
        file_extension = ".csv.gz"
        file_interval_s = 60
        file_max_bytes = 1000000
        """
    )
    (pipeline,) = made.pipelines
    assert (pipeline.file, pipeline.s3, pipeline.target) == (str(tmp_path), "plant", "s3://plant")
    assert (pipeline.kinesis.stream, pipeline.kinesis.region, pipeline.separator) == (None, "eu-west-1", "\n")
    assert not any("dead_letter" in line for line in made.warnings)  # they go to file_error_prefix
    assert read(effective(made)).pipelines == made.pipelines


def test_files_by_the_environment(tmp_path: Path) -> None:
    env = {
        "BROKER": "b.example", "CLIENTID": "c", "TOPIC": "a", "FASTKIN_PIPELINE_FILE": str(tmp_path),
        "FASTKIN_PIPELINE_S3": "plant", "AWS_REGION": "eu-west-1", "AWS_ENDPOINT_URL_KINESIS": "http://localhost:1",
        "AWS_ENDPOINT_URL_S3": "http://localhost:2",
    }  # fmt: skip
    (made,) = load_settings(env=env).pipelines
    assert (made.file, made.s3, made.kinesis.endpoint_url) == (str(tmp_path), "plant", "http://localhost:2")


def test_firehose_takes_no_keys(read: Any) -> None:
    made = read(CLIENT + SMALL.replace("stream = ", "firehose = ") + 'partition_key = "topic"\n')
    assert any("partition_key" in line and "Firehose, which takes no keys" in line for line in made.warnings)


@pytest.mark.parametrize("key", ["wire"])
def test_what_is_not_built_is_not_accepted(read: Any, key: str) -> None:
    (line,) = problems(read, CLIENT + SMALL + f'{key} = "x"\n')
    assert repr(key) in line
    assert "is not a key of this table" in line


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("qos", "3", "3 is out of range; use 0 to 2"),
        ("qos", '"1"', "not a whole number"),
        ("qos", "1.0", "not a whole number"),
        ("qos", "true", "not a whole number"),
        ("enabled", '"yes"', "not true or false"),
        ("enabled", "1", "not true or false"),
        ("linger_ms", '"50"', "not a number"),
        ("linger_ms", "nan", "not a number"),
        ("linger_ms", "inf", "out of range"),
        ("linger_ms", "-1", "out of range"),
        ("max_records", "501", "1 to 500"),
        ("max_records", "0", "1 to 500"),
        ("max_connections", "0", "1 to 256"),
        ("max_connections", "257", "1 to 256"),
        ("max_batch_bytes", str(10 * MIB + 1), "out of range"),
        ("max_record_bytes", str(10 * MIB + 1), "out of range"),
        ("max_record_bytes", str(6 * MIB), "has no room for one record of max_record_bytes"),
        ("max_batch_bytes", "100000", "has no room for one record of max_record_bytes"),
        ("budget_bytes", str(MIB), "has no room for one record of max_record_bytes"),
        ("format", '"bulkk"', "did you mean bulk?"),
        ("format", '"evnt"', "did you mean event?"),
        ("aggregation", '"gzip"', "use none, kpl"),
        ("startup_check", '"dryrun"', "did you mean dry_run?"),
        ("topics", "[]", "is empty"),
        ("topics", "[1]", "not a list of texts"),
        ("topics", '[""]', "empty text"),
        ("topics", '["a/#/b"]', "not a topic filter"),
        ("topics", '["a/b+"]', "not a topic filter"),
        ("topics", '["$share/g"]', "not a topic filter"),
        ("bulk_label", '"a/b"', "not one level"),
        ("bulk_label", '"+"', "not one level"),
        ("partition_key", '"md5"', "use uuid, content, topic"),
        ("partition_key", '"static:"', "1 to 256"),
        ("partition_key", '"topic:x"', "levels count from 0"),
        ("region", '"EU West"', "not a region"),
        ("role_arn", '"role/x"', "not the ARN of a role"),
        ("session_name", '"a b"', "not a session name"),
        ("stream", '"a b"', "not a stream name"),
        ("stream", '""', "is empty"),
        ("endpoint_url", '"localhost:4567"', "not an endpoint"),
        ("endpoint_url", '"http://u:p@h"', "not an endpoint"),
        ("endpoint_url", '"http://h:99999"', "not an endpoint"),
        ("transport", '"boto"', "use auto, native, sdk"),
        ("access_key", '"AK"', "without secret_key"),
        ("session_token", '"T"', "without access_key"),
        ("ca_bundle", '"/nope.pem"', "No such file"),
        ("id", '"a b"', "not fit for a log line"),
        ("description", '"a\\u001bb"', "control character"),
        ("dead_letter", '"/nope/x.jsonl"', "no directory /nope"),
    ],
)
def test_wrong_values_name_file_table_key_and_cure(read: Any, key: str, value: str, wanted: str) -> None:
    text = "\n".join(line for line in SMALL.splitlines() if not line.startswith(f"{key} "))
    lines = problems(read, f"{CLIENT}{text}\n{key} = {value}\n")
    assert len(lines) == 1, lines
    assert wanted in lines[0]
    assert re.search(r"fastkin\.toml:\d+: \[\[pipeline\]\] 1", lines[0])
    assert repr(key) in lines[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('url = "h:1883"', "not a way to connect"),
        ('url = "http://h"', "'http' is not a way to connect"),
        ('url = "//h"', "has no scheme"),
        ('url = "mqtt://"', "names no host"),
        ('url = "mqtt://h:x"', "is not an address"),
        ('url = "mqtt://h/path"', "more than host and port"),
        ('url = "mqtt://h:1"\nport = 2', "the address says another port"),
        ('host = "a b"', "not a host name"),
        ("port = 0", "1 to 65535"),
        ("port = 65536", "1 to 65535"),
        ('scheme = "ssl"', "use mqtt, mqtts, ws, wss"),
        ('path = "mqtt"\nscheme = "ws"', "does not begin with /"),
        ("keep_alive_s = 65536", "out of range"),
        ("receive_maximum = 0", "out of range"),
        ("reconnect_min_s = 60", "reconnect_max_s is less"),
        ('password = "p"', "without a user"),
        ('protocol = "4"', "use auto, 5, 3.1.1"),
        ('scheme = "mqtt"\n[broker.tls]\nalpn = ["x"]', "use mqtts://"),
        ('scheme = "ws"\n[broker.tls]\nalpn = ["x"]', "use wss://"),
        ('[broker.tls]\nca = "/nope.pem"', "No such file"),
        (f'[broker.tls]\nkey = "{GOOD_KEY}"', "without a certificate"),
    ],
)
def test_wrong_brokers(read: Any, text: str, wanted: str) -> None:
    lines = problems(read, f'[broker]\nclient_id = "c"\n{text}\n{SMALL}')
    assert len(lines) == 1, lines
    assert wanted in lines[0]
    assert re.search(r"fastkin\.toml:\d+: \[broker", lines[0])


def test_everything_wrong_is_told_at_once(read: Any) -> None:
    lines = problems(
        read,
        """
        [broker]
        port = 0
        keepalive = 1
        [kinesis]
        max_connections = 0
        [[pipeline]]
        id = "a"
        qos = 5
        stream = "s"
        [[pipeline]]
        topics = ["x"]
        """,
    )
    wanted = ["'port'", "'keepalive'", "'max_connections'", "'qos'", "neither topics", "no id"]
    for word in [*wanted, "no stream"]:
        assert any(word in line for line in lines), word


def test_two_pipelines_with_one_id_or_label_are_named_both(read: Any) -> None:
    lines = problems(
        read,
        CLIENT
        + """
        [kinesis]
        stream = "s"
        [[pipeline]]
        id = "a"
        bulk_label = "x"
        [[pipeline]]
        id = "b"
        bulk_label = "x"
        [[pipeline]]
        id = "a"
        topics = ["t"]
        """,
    )
    assert len(lines) == 2
    assert "two pipelines have the id 'a': [[pipeline]] 1 ('a') and [[pipeline]] 3 ('a')" in lines[0]
    assert "[[pipeline]] 1 ('a') and [[pipeline]] 2 ('b')" in lines[1]


def test_neither_topics_nor_label_names_both_keys(read: Any) -> None:
    (line,) = problems(read, CLIENT + '[[pipeline]]\nid = "a"\nstream = "s"\n')
    assert "has neither topics nor bulk_label nor events" in line
    assert line.endswith("set topics, bulk_label or events")


def test_a_bulk_label_stands_for_topic_and_format(read: Any) -> None:
    made = read(CLIENT + '[[pipeline]]\nid = "a"\nstream = "s"\nbulk_label = "telemetry"\n')
    (pipeline,) = made.pipelines
    assert pipeline.topics == ("/devices/+/bulkData/telemetry",)
    assert pipeline.format == "bulk"


@pytest.mark.parametrize("text", ["", "[broker]\n", "pipeline = 3\n", "[pipeline]\nid = 'a'\n"])
def test_a_file_without_a_pipeline(read: Any, text: str) -> None:
    assert any("pipeline" in line for line in problems(read, text))


def test_broken_files(tmp_path: Path) -> None:
    (line,) = problems(settings.load, tmp_path / "nope.toml", env={})
    assert "there is no such settings file" in line
    path = tmp_path / "x.toml"
    path.write_text("[broker\n")
    (line,) = problems(settings.load, path, env={})
    assert "is not TOML" in line
    assert "line 1" in line
    path.write_bytes(b"\xff")
    (line,) = problems(settings.load, path, env={})
    assert "not UTF-8" in line
    (line,) = problems(settings.load, tmp_path, env={})
    assert "cannot be read" in line


# --- broker addresses, sessions ---


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "path"),
    [
        ("mqtt://h", "mqtt", "h", 1883, "/mqtt"),
        ("mqtt://h:1", "mqtt", "h", 1, "/mqtt"),
        ("tcp://h", "mqtt", "h", 1883, "/mqtt"),
        ("ssl://h", "mqtts", "h", 8883, "/mqtt"),
        ("tls://h:1", "mqtts", "h", 1, "/mqtt"),
        ("mqtts://h", "mqtts", "h", 8883, "/mqtt"),
        ("ws://h", "ws", "h", 80, "/mqtt"),
        ("ws://h:8080/x", "ws", "h", 8080, "/x"),
        ("wss://h/", "wss", "h", 443, "/mqtt"),
        ("mqtt://[::1]:1883", "mqtt", "::1", 1883, "/mqtt"),
    ],
)
def test_addresses(read: Any, url: str, scheme: str, host: str, port: int, path: str) -> None:
    broker = read(f'[broker]\nurl = "{url}"\nclient_id = "c"\n{SMALL}').broker
    assert (broker.scheme, broker.host, broker.port, broker.path) == (scheme, host, port, path)
    assert broker == read(f'[broker]\nurl = "{broker.url}"\nclient_id = "c"\n{SMALL}').broker


def test_user_and_password_of_an_address(read: Any) -> None:
    made = read(f'[broker]\nurl = "mqtts://u%40x:p%2F@h"\nclient_id = "c"\n{SMALL}')
    assert (made.broker.user, made.broker.password) == ("u@x", "p/")
    assert "p/" not in repr(made)
    assert made.broker.url == "mqtts://h:8883"


def test_a_tls_table_alone_means_mqtts(read: Any) -> None:
    made = read(f'[broker]\nhost = "h"\nclient_id = "c"\n[broker.tls]\nalpn = ["x"]\n{SMALL}')
    assert (made.broker.scheme, made.broker.port) == ("mqtts", 8883)


def test_a_session_needs_a_client_id(read: Any) -> None:
    made = read(SMALL)
    assert re.fullmatch(r"fastkin-[0-9a-f]{12}", made.broker.client_id)
    assert made.broker.clean_session
    assert any("set client_id" in warning for warning in made.warnings)
    assert read(SMALL).broker.client_id != made.broker.client_id
    blank = read('[broker]\nclient_id = ""\nclean_session = true\n' + SMALL).broker
    assert (blank.client_id, blank.clean_session) == ("", True)
    (line,) = problems(read, "[broker]\nclean_session = false\n" + SMALL)
    assert "set client_id" in line


def test_a_client_id_that_looks_drawn_is_a_client_id(read: Any) -> None:
    made = read('[broker]\nclient_id = "fastkin-1"\n' + SMALL + 'partition_key = "client"\n')
    assert not made.broker.clean_session
    (line,) = problems(read, SMALL + 'partition_key = "client"\n')
    assert "set client_id" in line


@pytest.mark.parametrize("how", ["kpl", "lines"])
def test_keys_made_from_content_leave_nothing_to_aggregate(read: Any, how: str) -> None:
    """Unless a message is a frame of records."""
    text = CLIENT + SMALL + f'partition_key = "content"\naggregation = "{how}"\n'
    (line,) = read(text).warnings
    assert "nothing is aggregated: with partition_key content only records of one message" in line
    assert not read(text + 'format = "bulk"\n').warnings
    assert not read(text + 'bulk_label = "a"\n').warnings


def test_passwords_in_the_clear_are_warned_of(read: Any) -> None:
    text = '[broker]\nurl = "mqtt://u:p@{}"\nclient_id = "c"\n' + SMALL
    assert any("unencrypted" in each for each in read(text.format("h.example")).warnings)
    assert not read(text.format("127.0.0.1")).warnings


# --- the stream ---


def test_an_arn_brings_stream_and_region(read: Any) -> None:
    made = read(CLIENT + f'[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream_arn = "{ARN}"\n')
    kinesis = made.pipelines[0].kinesis
    assert (kinesis.stream, kinesis.stream_arn, kinesis.region) == ("welders", ARN, "eu-west-1")


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ('region = "us-east-1"', "region 'us-east-1' differs from 'eu-west-1' in stream_arn"),
        ('stream = "other"', "stream 'other' differs from 'welders' in stream_arn"),
    ],
)
def test_an_arn_that_contradicts_is_an_error(read: Any, more: str, wanted: str) -> None:
    text = CLIENT + f'[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream_arn = "{ARN}"\n{more}\n'
    (line,) = problems(read, text)
    assert wanted in line


def test_an_arn_wins_over_defaults_from_farther_away(read: Any) -> None:
    pipeline = f'[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream_arn = "{ARN}"\n'
    common = '[kinesis]\nregion = "us-east-1"\nstream = "common"\n'
    for text, env in ((pipeline, {"AWS_REGION": "us-east-1"}), (common + pipeline, {})):
        kinesis = read(CLIENT + text, env).pipelines[0].kinesis
        assert (kinesis.stream, kinesis.region) == ("welders", "eu-west-1")


@pytest.mark.parametrize("arn", ["welders", ARN.replace("kinesis", "firehose"), ARN[:-8], ARN + "/x"])
def test_wrong_arns(read: Any, arn: str) -> None:
    text = CLIENT + f'[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream_arn = "{arn}"\n'
    (line,) = problems(read, text)
    assert "not the ARN of a stream" in line


def test_own_keys_replace_the_common_ones_as_a_group(read: Any) -> None:
    made = read(
        CLIENT
        + """
        [kinesis]
        stream = "s"
        access_key = "A"
        secret_key = "S"
        session_token = "T"
        [[pipeline]]
        id = "a"
        topics = ["a"]
        access_key = "A2"
        secret_key = "S2"
        [[pipeline]]
        id = "b"
        topics = ["b"]
        profile = "p"
        """
    )
    a, b = (pipeline.kinesis for pipeline in made.pipelines)
    assert (a.access_key, a.secret_key, a.session_token) == ("A2", "S2", None)
    assert (b.profile, b.access_key, b.session_token) == ("p", None, None)


def test_role_settings_without_a_role_are_told(read: Any) -> None:
    made = read(CLIENT + SMALL + 'external_id = "ext"\n')
    assert any("not used without role_arn" in warning for warning in made.warnings)


def test_unencrypted_endpoints_are_told_but_not_emulators(read: Any) -> None:
    text = CLIENT + SMALL + 'endpoint_url = "{}"\n'
    assert read(text.format("http://k.example")).warnings
    assert not read(text.format("http://localhost:4567")).warnings


def test_no_dead_letter_file_is_told(read: Any) -> None:
    text = CLIENT + SMALL.replace('dead_letter = "none"\n', "")
    (warning,) = read(text).warnings
    assert "no dead_letter for 'a'" in warning


def test_disabled_pipelines_stay_in_the_list(read: Any) -> None:
    made = read(CLIENT + SMALL + "enabled = false\n")
    assert [pipeline.enabled for pipeline in made.pipelines] == [False]
    assert any("nothing to do" in warning for warning in made.warnings)


# --- the environment ---

MICROSERVICE_SAMPLE = """
 PORT=1883
 WEBSOCKET=
 BROKER=public.mqtthq.com
 USER=
 PASS=
 CLIENTID=client-123
 TOPIC=homeassistant/sensor/#
 QOS=0
 BACKLOG_COUNT=2000
 KIN_STREAM_NAME=kinesis-data-stream
 KIN_MAXCONN=10
 KIN_SESSION_NAME=mysession-1234
 KIN_PARTITION_KEY=sensor-data
 AWS_ACCESS_KEY_ID=nnnnnnnnnnnnnnnnnnnnn
 AWS_SECRET_ACCESS_KEY=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
 AWS_ASSUME_ROLE_ARN=arn:aws:iam::1111111111111:role/service-role/kinesis-endpoint-access
 AWS_REGION=us-east-1
 STDOUT=true
"""


def test_the_microservices_env_file_works_unchanged(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(MICROSERVICE_SAMPLE)
    made = env_only({"USER": "root", "HOME": "/root"}, env_file=path, login="root")
    broker, (pipeline,) = made.broker, made.pipelines
    assert broker.url == "mqtt://public.mqtthq.com:1883"
    assert (broker.client_id, broker.user, broker.password) == ("client-123", None, None)
    assert not broker.clean_session
    assert (pipeline.id, pipeline.topics, pipeline.qos) == ("default", ("homeassistant/sensor/#",), 0)
    assert (pipeline.budget_records, pipeline.stdout) == (2000, True)
    assert pipeline.partition_key == "static:sensor-data"
    kinesis = pipeline.kinesis
    assert (kinesis.stream, kinesis.max_connections) == ("kinesis-data-stream", 10)
    assert kinesis.role_arn is not None
    assert (kinesis.session_name, kinesis.region) == ("mysession-1234", "us-east-1")
    assert kinesis.access_key == "n" * 21
    assert kinesis.secret_key == "x" * 40


@pytest.mark.parametrize(
    ("env", "url"),
    [
        ({"BROKER": "h"}, "mqtt://h:1883"),
        ({"BROKER": "h", "PORT": "1884"}, "mqtt://h:1884"),
        ({"BROKER": "h:1884"}, "mqtt://h:1884"),
        ({"BROKER": "tcp://h", "PORT": "1884"}, "mqtt://h:1884"),
        ({"BROKER": "ssl://h"}, "mqtts://h:8883"),
        ({"BROKER": "mqtts://h:1"}, "mqtts://h:1"),
        ({"BROKER": "ws://h:8080/x"}, "ws://h:8080/x"),
        ({"BROKER": "h", "WEBSOCKET": "8080"}, "ws://h:8080/mqtt"),
        ({"BROKER": "h", "PORT": "1883", "WEBSOCKET": "8080"}, "mqtt://h:1883"),
        ({"BROKER": "tcp://h", "PORT": "1883", "WEBSOCKET": "8080"}, "mqtt://h:1883"),
        ({"BROKER": "::1", "PORT": "1883"}, "mqtt://[::1]:1883"),
        ({"PORT": "1884"}, "mqtt://localhost:1884"),
        ({"FASTKIN_BROKER_URL": "mqtts://x"}, "mqtts://x:8883"),
        ({"BROKER": "h", "PORT": "1884", "FASTKIN_BROKER_URL": "mqtts://x"}, "mqtts://x:8883"),
    ],
)
def test_brokers_of_the_environment(env: dict[str, str], url: str) -> None:
    base = {name: value for name, value in MICRO.items() if name != "BROKER"}
    assert env_only(base | env).broker.url == url


def test_a_websocket_port_beside_a_port_is_told() -> None:
    """MK-04: TCP, as the microservice does, and a line that says so; a port alone is one of WebSocket."""
    (told,) = [each for each in env_only(MICRO | {"PORT": "1883", "WEBSOCKET": "8080"}).warnings if "WEBSOCKET" in each]
    assert told.startswith("WEBSOCKET not used: PORT is set, connecting to ")
    assert not any("WEBSOCKET" in each for each in env_only(MICRO | {"WEBSOCKET": "8080"}).warnings)


@pytest.mark.parametrize(
    ("region", "good"),
    [
        ("us-east-1", True), ("us-gov-west-1", True), ("ap-southeast-7", True), ("local", True), ("", False),
        ("bad-region", False), ("us east (n. virginia)", False), ("eu-west-1a", False), ("US-EAST-1", False),
    ],
)  # fmt: skip
def test_a_region_is_an_id(read: Any, region: str, good: bool) -> None:
    """SP-03: spark's cases, a zone, and names of the console, refused before anything is opened."""
    text = CLIENT + f'[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream = "s"\nregion = "{region}"\n'
    if good:
        assert read(text).pipelines[0].kinesis.region == region
    else:
        (line,) = problems(read, text)
        assert "key 'region'" in line


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({"PORT": "x"}, "PORT: 'x' is not a whole number"),
        ({"PORT": "70000"}, "out of range"),
        ({"WEBSOCKET": "yes"}, "WEBSOCKET: 'yes' is not a whole number"),
        ({"BROKER": "h:1", "WEBSOCKET": "8080"}, "BROKER has a port already"),
        ({"BROKER": "tcp://h:1", "PORT": "2"}, "PORT: the address says another port"),
        ({"QOS": "3"}, "QOS: 3 is out of range"),
        ({"QOS": "one"}, "QOS: 'one' is not a whole number; use 0 to 2"),
        ({"KIN_MAXCONN": "0"}, "1 to 256"),
        ({"KIN_MAXCONN": "257"}, "1 to 256"),
        ({"KIN_MAXCONN": "many"}, "not a whole number; use 1 to 256"),
        ({"STDOUT": "maybe"}, "STDOUT: 'maybe' is not true or false"),
        ({"BACKLOG_COUNT": "-5"}, "out of range"),
        ({"KIN_PARTITION_KEY": "k" * 257}, "1 to 256"),
        ({"AWS_ASSUME_ROLE_ARN": "x"}, "not the ARN of a role"),
        ({"TOPIC": "a/#/b"}, "not a topic filter"),
        ({"FASTKIN_BROKER_PROT": "1"}, "did you mean FASTKIN_BROKER_PORT?"),
        ({"AWS_ENDPOINT_URL": "nowhere"}, "AWS_ENDPOINT_URL: is not an endpoint"),
    ],
)
def test_wrong_variables_are_named(env: dict[str, str], wanted: str) -> None:
    lines = problems(env_only, MICRO | env)
    assert len(lines) == 1, lines
    assert wanted in lines[0]
    assert "environment variable" in lines[0]


@pytest.mark.parametrize("missing", ["TOPIC", "KIN_STREAM_NAME"])
def test_what_the_environment_lacks_is_named(missing: str) -> None:
    (line,) = problems(env_only, {k: v for k, v in MICRO.items() if k != missing})
    assert missing in line


def test_nothing_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = problems(env_only, {"USER": "root", "PATH": "/bin"}, login="root")
    assert "set BROKER, TOPIC and KIN_STREAM_NAME" in line
    assert "--env-file" not in line
    (tmp_path / ".env").write_text("BROKER=h\n")
    (line,) = problems(env_only, {})
    assert "--env-file .env" in line


def test_topics_are_separated_by_commas() -> None:
    made = env_only(MICRO | {"TOPIC": "a/+, $share/g/b/# ,c,"})
    assert made.pipelines[0].topics == ("a/+", "$share/g/b/#", "c")


@pytest.mark.parametrize(
    ("env", "user", "password", "warned"),
    [
        ({}, None, None, False),
        ({"USER": "root"}, None, None, True),
        ({"USER": "root", "PASS": "p"}, "root", "p", True),
        ({"USER": "root", "MQTT_PASS": "p"}, "root", "p", True),
        ({"USER": "mqtt"}, "mqtt", None, False),
        ({"USER": "mqtt", "PASS": "p"}, "mqtt", "p", False),
        ({"MQTT_USER": "root", "USER": "root"}, "root", None, False),
        ({"MQTT_USER": "m", "MQTT_PASS": "q", "USER": "x", "PASS": "p"}, "m", "q", False),
    ],
)
def test_the_shells_user_is_not_the_brokers(
    env: dict[str, str], user: str | None, password: str | None, warned: bool
) -> None:
    made = env_only(MICRO | env, login="root")
    assert (made.broker.user, made.broker.password) == (user, password)
    assert any("MQTT_USER" in warning for warning in made.warnings) is warned


def test_a_user_of_the_env_file_is_meant(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("USER=root\n")
    made = env_only(MICRO, env_file=path, login="root")
    assert made.broker.user == "root"
    assert not any("MQTT_USER" in warning for warning in made.warnings)


def test_the_shells_user_beside_a_password_of_the_env_file_is_told(tmp_path: Path) -> None:
    """It is sent, as it may be meant; if it is not, the broker's refusal alone would not say where it came from."""
    path = tmp_path / ".env"
    path.write_text("PASS=secret\n")
    made = env_only(MICRO | {"USER": "me"}, env_file=path, login="me")
    assert (made.broker.user, made.broker.password) == ("me", "secret")
    (told,) = [warning for warning in made.warnings if "MQTT_USER" in warning]
    assert "USER=me comes from the environment" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("env", "user", "password", "warned"),
    [
        ({"USER": "me"}, "welder", "p", False),  # as in every login shell
        ({"USER": "other"}, "other", "p", False),  # said on purpose
        ({"USER": "me", "PASS": "q"}, "me", "q", True),
    ],
)
def test_the_login_name_does_not_replace_the_user_of_the_env_file(
    tmp_path: Path, env: dict[str, str], user: str, password: str, warned: bool
) -> None:
    path = tmp_path / ".env"
    path.write_text("USER=welder\nPASS=p\n")
    made = env_only(MICRO | env, env_file=path, login="me")
    assert (made.broker.user, made.broker.password) == (user, password)
    assert any("MQTT_USER" in warning for warning in made.warnings) is warned


def test_dockerlog_is_ignored_with_a_note() -> None:
    assert any("DOCKERLOG" in warning for warning in env_only(MICRO | {"DOCKERLOG": "1"}).warnings)


def test_every_key_has_a_fastkin_name(read: Any, tmp_path: Path) -> None:
    for table, names in tables.TABLES.items():
        for name in names:
            assert f"FASTKIN_{table.replace('.', '_').upper()}_{name.upper()}" in tables.ENV
    env = {
        "FASTKIN_BROKER_HOST": "h2",
        "FASTKIN_BROKER_TLS_ALPN": "a,b",
        "FASTKIN_KINESIS_REGION": "eu-west-1",
        "FASTKIN_KINESIS_STREAM_ARN": ARN,
        "FASTKIN_PIPELINE_LINGER_MS": "5",
        "FASTKIN_PIPELINE_ENABLED": "off",
        "FASTKIN_PIPELINE_TOPICS": "x,y",
        "FASTKIN_BUILD": "release",
    }
    made = read('[broker]\nhost = "h1"\nclient_id = "c"\n' + SMALL, env)
    (pipeline,) = made.pipelines
    assert (made.broker.host, made.broker.tls.alpn) == ("h2", ("a", "b"))
    assert (pipeline.linger_ms, pipeline.enabled, pipeline.topics) == (5.0, False, ("x", "y"))
    # over the pipeline's own stream as well: the nearest to the operator wins
    assert (pipeline.kinesis.stream, pipeline.kinesis.region) == ("welders", "eu-west-1")
    alone = env_only({"FASTKIN_PIPELINE_TOPICS": "t", "FASTKIN_KINESIS_STREAM": "s"})
    assert alone.pipelines[0].topics == ("t",)


def test_a_part_of_the_environment_wins_over_the_address_of_the_file(read: Any) -> None:
    text = '[broker]\nurl = "mqtts://u:p@h1:1"\nclient_id = "c"\n' + SMALL
    env = {"FASTKIN_BROKER_HOST": "h2", "FASTKIN_BROKER_PASSWORD": "q"}
    broker = read(text, env).broker
    assert (broker.url, broker.user, broker.password) == ("mqtts://h2:1", "u", "q")
    assert read(text, {"FASTKIN_BROKER_URL": "ws://h3/x"}).broker.url == "ws://h3:80/x"


def test_what_all_pipelines_share_is_told_once(read: Any) -> None:
    text = CLIENT + "[kinesis]\nmax_connections = 0\n" + SMALL + SMALL.replace('"a"', '"b"')
    (line,) = problems(read, text)
    assert "[kinesis] key 'max_connections': 0 is out of range" in line


def test_fastkin_names_for_several_pipelines(read: Any) -> None:
    text = CLIENT + SMALL + SMALL.replace('"a"', '"b"')
    made = read(text, {"FASTKIN_PIPELINE_QOS": "2"})
    assert [pipeline.qos for pipeline in made.pipelines] == [2, 2]
    (line,) = problems(read, text, {"FASTKIN_PIPELINE_TOPICS": "x"})
    assert "cannot be set for 2 pipelines at once" in line


def test_microservice_names_beside_a_file_are_not_used_but_told(read: Any) -> None:
    made = read(CLIENT + SMALL, {"BROKER": "x", "KIN_STREAM_NAME": "y", "USER": "z", "QOS": "2"})
    assert made.broker.host == "localhost"
    assert made.broker.user is None
    assert made.pipelines[0].kinesis.stream == "s"
    assert any("BROKER, KIN_STREAM_NAME, QOS not used" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("env", "endpoint"),
    [
        ({"AWS_ENDPOINT": "http://localhost:1"}, "http://localhost:1"),
        ({"AWS_ENDPOINT_URL": "http://localhost:2"}, "http://localhost:2"),
        (
            {
                "AWS_ENDPOINT": "http://localhost:1",
                "AWS_ENDPOINT_URL": "http://localhost:2",
                "AWS_ENDPOINT_URL_KINESIS": "http://localhost:3",
            },
            "http://localhost:3",
        ),
        (
            {
                "AWS_ENDPOINT_URL": "http://localhost:2",
                "FASTKIN_KINESIS_ENDPOINT_URL": "http://localhost:4",
            },
            "http://localhost:4",
        ),
        (
            {
                "AWS_ENDPOINT_URL": "http://localhost:2",
                "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
            },
            None,
        ),
    ],
)
def test_endpoints_of_the_environment(env: dict[str, str], endpoint: str | None) -> None:
    assert env_only(MICRO | env).pipelines[0].kinesis.endpoint_url == endpoint


def test_the_file_wins_over_aws_names(read: Any) -> None:
    made = read(CLIENT + SMALL + 'region = "eu-west-1"\n', {"AWS_REGION": "us-east-1"})
    assert made.pipelines[0].kinesis.region == "eu-west-1"
    made = read(CLIENT + SMALL, {"AWS_DEFAULT_REGION": "us-east-1"})
    assert made.pipelines[0].kinesis.region == "us-east-1"


def test_keys_of_the_environment_are_left_to_the_credentials() -> None:
    env = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK"}
    assert env_only(MICRO | env).pipelines[0].kinesis.access_key is None


# --- the env file ---


def parse(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / ".env"
    path.write_text(text)
    return {name: value for name, (value, _) in envfile.read(path).items()}


def test_env_files(tmp_path: Path) -> None:
    text = (
        '\ufeff# comment\n\nA=1\n export B = two words # comment\nC=\'a # b\'\nD="x\\n\\"y\\"\\$\\\\"\n'
        "E=\nF=a#b\nG=x=y\nH='' # empty\n\tI=tab\r\n"
    )
    assert parse(tmp_path, text) == {
        "A": "1",
        "B": "two words",
        "C": "a # b",
        "D": 'x\n"y"$\\',
        "E": "",
        "F": "a#b",
        "G": "x=y",
        "H": "",
        "I": "tab",
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A=1\nsecretword", "line 2: is not KEY=VALUE"),
        ("1A=secretword", "line 1: '1A' is not a name"),
        ("A B=secretword", "line 1: 'A B' is not a name"),
        ("A='secretword", "line 1: the quotes of A are not closed"),
        ('A="secretword', "line 1: the quotes of A are not closed"),
        ("A='x' secretword", "text after the closing quote of A"),
        ('A="secretword\\q"', "\\q in the value of A means nothing"),
        ("A=1\n\nA=secretword", "line 3: A is set again, first in line 1"),
    ],
)
def test_wrong_env_files_name_the_line_and_show_no_value(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, text)
    assert wanted in str(caught.value)
    assert ".env" in str(caught.value)
    assert "secretword" not in str(caught.value)


def test_a_missing_env_file_is_an_error(tmp_path: Path) -> None:
    (line,) = problems(env_only, MICRO, env_file=tmp_path / "nope")
    assert "no such env file" in line
    (tmp_path / "latin").write_bytes(b"A=\xe4\n")
    (line,) = problems(env_only, MICRO, env_file=tmp_path / "latin")
    assert "not UTF-8" in line


def test_the_real_environment_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("QOS=2\nKIN_STREAM_NAME=file\nTOPIK=x\nAWS_SOMETHING=1\nOTHER=1\nKIN_MAXCONN=0\n")
    env = MICRO | {"KIN_MAXCONN": "5"}
    made = env_only(env, env_file=path)
    assert made.pipelines[0].qos == 2
    assert made.pipelines[0].kinesis.stream == "s"
    assert made.pipelines[0].kinesis.max_connections == 5
    assert any("line 3: TOPIK: not used; did you mean TOPIC?" in each for each in made.warnings)
    assert not any("OTHER" in each or "AWS_SOMETHING" in each for each in made.warnings)
    path.write_text("QOS=7\n")
    (line,) = problems(env_only, MICRO, env_file=path)
    assert f"{path} line 1: QOS: 7 is out of range" in line


# --- partition keys ---


@pytest.mark.parametrize(
    ("spec", "kind", "parts"),
    [
        ("uuid", "uuid", ()),
        ("none", "none", ()),
        ("topic", "parts", (("topic", None),)),
        ("topic:2", "parts", (("level", 2),)),
        ("content", "content", ()),
        ("topic_level:0", "parts", (("level", 0),)),
        ("field:a", "parts", (("field", ("a",)),)),
        ("field:a.b", "parts", (("field", ("a", "b")),)),
        ("client", "parts", (("text", "me"),)),
        ("static:x:y", "parts", (("text", "x:y"),)),
        ("template:{hostname}/{topic[1]}", "parts", (("text", "host/"), ("level", 1))),
        (
            "template:{{{topic}}}-{field:a.b}{client}",
            "parts",
            (("text", "{"), ("topic", None), ("text", "}-"), ("field", ("a", "b")), ("text", "me")),
        ),
        ("template:x", "parts", (("text", "x"),)),
    ],
)
def test_partition_keys(spec: str, kind: str, parts: tuple[Any, ...]) -> None:
    assert keys.key_plan(spec, client_id="me", hostname="host") == (kind, parts)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "UUID",
        "uuid:1",
        "content:1",
        "none:",
        "client:x",
        "topic:",
        "topic:-1",
        "topic:1.5",
        "field:",
        "field:a..b",
        "field",
        "static",
        "static:",
        "static:" + "x" * 257,
        "template:",
        "template:{",
        "template:}",
        "template:{nope}",
        "template:{topic[x]}",
        "template:{field:}",
        "template:" + "x" * 257,
    ],
)
def test_wrong_partition_keys(spec: str) -> None:
    with pytest.raises(keys.KeySpecError) as caught:
        keys.key_plan(spec, client_id="me", hostname="host")
    assert caught.value.problem
    assert caught.value.cure


def test_a_static_key_may_have_256_characters_of_any_kind() -> None:
    assert keys.key_plan("static:" + "\U0001f600" * 256).parts == (("text", "\U0001f600" * 256),)


# --- showing ---


def test_effective_hides_secrets_and_can_be_read_again(read: Any, tmp_path: Path) -> None:
    secrets = ("brokerpass", "accesskey", "secretkey", "sessiontoken", "externalid")
    text = (
        '[broker]\nurl = "mqtts://u:brokerpass@h"\nclient_id = "c"\n'
        '[broker.tls]\nalpn = ["a\\"b"]\n'
        '[kinesis]\naccess_key = "accesskey"\nsecret_key = "secretkey"\nsession_token = "sessiontoken"\n'
        'external_id = "externalid"\nrole_arn = "arn:aws:iam::123456789012:role/r"\n'
        + SMALL
        + 'bulk_label = "x"\ndescription = "ü \\"q\\" \\\\"\n'
    )
    made = read(text)
    shown = effective(made)
    for secret in secrets:
        assert secret not in shown
        assert secret not in repr(made)
    assert shown.count('"***"') == 5
    assert len(problems(read, shown)) == 5  # what was not shown must be given again
    again = read(shown.replace("***", "given"))
    assert effective(again) == shown
    assert again.pipelines[0].topics == made.pipelines[0].topics


@pytest.mark.parametrize(
    "text",
    [
        '[broker]\npassword = 5\nuser = "u"\n',
        '[broker]\nurl = "mqtt://u:secretword@"\n',
        '[broker]\nurl = "xx://u:secretword@h"\n',
        '[broker]\nurl = "mqtt://u:secretword@h:x"\n',
        '[kinesis]\nsecret_key = ["secretword"]\n',
        '[kinesis]\naccess_key = "secretword"\n',
        '[kinesis]\nsecret_key = "secretword\\u0000"\naccess_key = "x"\n',
        '[kinesis]\nendpoint_url = "http://u:secretword@h"\n',
    ],
)
def test_no_message_shows_a_secret(read: Any, text: str) -> None:
    for line in problems(read, text + SMALL):
        assert "secretword" not in line
        assert " 5 " not in line


def test_load_settings_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(CLIENT + SMALL)
    assert load_settings(path, env={}) == settings.load(path, env={})


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ('on_full = "spool"', "key 'on_full': on_full is spool, and no file is named; set spool"),
        ('on_full = "spool"\nspool = "{tmp}/no/spool.db"', "there is no directory {tmp}/no; make it"),
        ('on_full = "spool"\nspool = "{tmp}"', "{tmp} is a directory; name a file in it"),
        ('on_full = "spool"\nspool = "{tmp}/s"\nspool_max_bytes = 1048576', "has no room for two records"),
        ('on_full = "drop"', "use pause, spool, drop_oldest, drop_newest"),
        ("spool_max_bytes = 1", "spool_max_bytes"),
    ],
)
def test_spools_that_cannot_be(read: Any, tmp_path: Path, extra: str, says: str) -> None:
    (line,) = problems(read, CLIENT + SMALL + extra.format(tmp=tmp_path) + "\n")
    assert says.format(tmp=tmp_path) in line
    assert "[[pipeline]] 1 ('a')" in line


def test_two_pipelines_cannot_share_a_spool(read: Any, tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(tmp_path)
    one = f'id = "a"\ntopics = ["a"]\nstream = "s"\nregion = "r"\non_full = "spool"\nspool = "{tmp_path}/s.db"\n'
    two = one.replace('"a"', '"b"').replace("/s.db", "/here/s.db")
    (line,) = problems(read, CLIENT + "[[pipeline]]\n" + one + "[[pipeline]]\n" + two)
    assert "two pipelines have the spool" in line
    assert "'a'" in line
    assert "name a file for each" in line


def test_spool_settings_without_a_spool_are_pointed_out(read: Any) -> None:
    made = read(CLIENT + SMALL + 'spool = "x"\n')
    assert any("not used without on_full" in warning for warning in made.warnings)
    made = read(CLIENT + SMALL + "spool_after_s = 1\n")
    assert any("not used without on_full" in warning for warning in made.warnings)


# --- [workers] ---


def test_workers_are_read_from_file_and_environment(read: Any) -> None:
    made = read(CLIENT + '[workers]\ncount = 3\ngroup = "line"\n' + SMALL)
    assert made.workers == Workers(count=3, group="line")
    assert '[workers]\ncount = 3\ngroup = "line"\n' in effective(made)
    assert read(CLIENT + SMALL, {"FASTKIN_WORKERS_COUNT": "2"}).workers == Workers(count=2)
    assert read(CLIENT + SMALL).workers == Workers()
    assert "[workers]" not in effective(read(CLIENT + SMALL))


@pytest.mark.parametrize(("said", "count"), [(None, 3), (0, 0), (5, 5)])
def test_the_command_line_wins_with_the_number_of_workers(tmp_path: Path, said: int | None, count: int) -> None:
    path = tmp_path / "fastkin.toml"
    path.write_text(CLIENT + "[workers]\ncount = 3\n" + SMALL)
    reader = Reader(str(path), None, {"FASTKIN_WORKERS_COUNT": "4"} if said is not None else {}, workers=said)
    assert reader.read().workers.count == count
    assert reader.read_again()[0].workers.count == count, "also at a reload"
