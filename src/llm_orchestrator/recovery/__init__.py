"""Getting back what was lost: backup files, the stream archive, restore, repair, readiness.

A backup counts only once it has been restored and checked (P7), so every verb here ends in a check
that can fail:

    create   one consistent cut of a live store, in one file          create.py, pack.py
    verify   every byte of a file, without restoring it               verify.py
    prove    the file restored aside, its chains walked, an engine    prove.py
             started on the copy; the result is a record of the live store
    prune    what retention lets go; never the last proved one        prune.py
    restore  verify, aside, check, swap; the old store is kept        restore.py
    stream   every committed batch in a second place, and back        stream*.py, rebuild.py
    reconcile effects that a restored store does not know of          reconcile.py
    readiness what would be lost now, and what is proved              readiness.py

Where files are kept is a `Place` (places.py: a folder; places_s3.py: an object store). How a store
is copied and exchanged is `store/copying.py`; nothing here opens a database.
"""
