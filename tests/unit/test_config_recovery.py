"""Settings of backups, archives and object stores: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_orchestrator.config import Config, load_config
from llm_orchestrator.errors import ConfigError


def of(folder: Path, text: str) -> Config:
    file = folder / "settings.toml"
    file.write_text(text)
    return load_config(file=file, environ={})


def test_backups_are_kept_in_the_data_folder_unless_said_otherwise(tmp_path: Path) -> None:
    assert load_config({"data_dir": tmp_path}, environ={}).backup_folder == tmp_path / "backups"
    own = of(tmp_path, 'backup_dir = "~/kept"')
    assert own.backup_folder == Path.home() / "kept"
    shown = {one.name: one.value for one in own.settings()}
    assert shown["backup_dir"] == own.backup_folder


def test_everything_of_recovery_can_be_set(tmp_path: Path) -> None:
    config = of(
        tmp_path,
        """
        backup_place = "s3://bucket/some/prefix"
        backup_recipients = ["age1abc", "/etc/llmo/keys.txt"]
        backup_identity = "file:/etc/llmo/key"
        backup_compression = "zstd"
        backup_bytes_per_s = 1000000
        backup_schedule = "30 2 * * mon-fri"
        backup_keep_daily = 7
        s3_endpoint_url = "https://someone:hunter2@store.example"
        s3_access_key = "env:ACCESS"
        s3_secret_key = "file:/run/secrets/s3"
        archive_place = "/mnt/other"
        archive_mode = "async"
        archive_on_failure = "degrade"
        archive_lag_s = 2
        restore_hold = true
        """,
    )
    assert config.backup_recipients == ["age1abc", "/etc/llmo/keys.txt"]
    assert (config.backup_keep_days, config.backup_keep_daily) == (30, 7)
    assert config.restore_hold
    assert "hunter2" not in str(config.settings())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('backup_schedule = "2 o\'clock"', "five fields"),
        ('backup_schedule = "0 25 * * *"', "five fields"),
        ("backup_keep_days = -1", "0 or more"),
        ("backup_keep_last = true", "0 or more"),
        ("backup_bytes_per_s = 1.5", "0 or more"),
        ('backup_place = "gs://bucket"', "s3://BUCKET/PREFIX"),
        ('archive_place = "s3:///nothing"', "s3://BUCKET/PREFIX"),
        ('backup_recipients = "age1abc"', "a list"),
        ('backup_recipients = [""]', "a list"),
        ('archive_mode = "sometimes"', "sync, async"),
        ('archive_on_failure = "pray"', "stall, degrade"),
        ('backup_compression = "rar"', "gzip, zstd"),
        ("archive_lag_s = 0", "above 0"),
        ('restore_hold = "yes"', "true or false"),
        ('s3_access_key = "env:ACCESS"', "go together"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=line.split(" ", maxsplit=1)[0]) as caught:
        of(tmp_path, line)
    assert said in caught.value.message


def test_a_key_written_out_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="s3_secret_key") as caught:
        of(tmp_path, 's3_access_key = "env:A"\ns3_secret_key = "wJalrXUtnFEMI"')
    assert "wJalrXUtnFEMI" not in str(caught.value)
    assert "a reference" in caught.value.message
