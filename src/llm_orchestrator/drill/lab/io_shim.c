/* Makes a program's disk fail or slow: preloaded into the database servers of a lab (io_shim.py).
 *
 * LLMO_IO_RULES names a file of rules, one a line: OP PATH-SUBSTRING ERRNO PERCENT DELAY_MS, where OP
 * is write, fsync or read, and ERRNO 0 only delays. Without that file every call costs one failed
 * open. What a rule did is appended to the file LLMO_IO_DONE: OP ERRNO DELAY_MS PATH.
 * It must never allocate, nor change errno of a call that it lets through.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { PATH = 512, RULES = 2048, LINE = 700 };

static ssize_t slurp(const char *path, char *into, size_t size) {
    int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (file < 0) return -1;
    ssize_t got = syscall(SYS_read, file, into, size - 1);
    syscall(SYS_close, file);
    if (got >= 0) into[got] = 0;
    return got;
}

static void note(const char *op, int number, int delay_ms, const char *path) {
    char line[LINE];
    const char *done = getenv("LLMO_IO_DONE");
    int length = snprintf(line, sizeof line, "%s %d %d %s\n", op, number, delay_ms, path);
    int file = done ? (int)syscall(SYS_openat, AT_FDCWD, done,
                                   O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    if (file < 0) return;
    syscall(SYS_write, file, line, length < LINE ? length : LINE - 1);
    syscall(SYS_close, file);
}

static int chance(int percent) {
    struct timespec now;
    if (percent >= 100) return 1;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_nsec / 100) % 100 < percent;
}

/* The errno with which this call is to fail; 0: it goes through, perhaps later. */
static int meets(const char *op, int descriptor) {
    char rules[RULES], link[64], path[PATH], of[16], part[128], *rest;
    int kept = errno, number, percent, delay_ms, fails = 0;
    const char *place = getenv("LLMO_IO_RULES");
    if (!place || slurp(place, rules, sizeof rules) <= 0) goto out;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) goto out;
    path[length] = 0;
    for (char *line = strtok_r(rules, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        if (sscanf(line, "%15s %127s %d %d %d", of, part, &number, &percent, &delay_ms) != 5 ||
            strcmp(of, op) || !strstr(path, part) || !chance(percent))
            continue;
        struct timespec pause = {delay_ms / 1000, (delay_ms % 1000) * 1000000L};
        note(op, number, delay_ms, path);
        while (delay_ms && nanosleep(&pause, &pause) && errno == EINTR) continue;
        fails = number;
        break;
    }
out:
    errno = kept;
    return fails;
}

#define SHIM(result, name, op, parameters, arguments)          \
    result name parameters {                                   \
        static result(*real) parameters;                       \
        int fails = meets(op, descriptor);                     \
        if (fails) {                                           \
            errno = fails;                                     \
            return -1;                                         \
        }                                                      \
        if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name);  \
        return real arguments;                                 \
    }

SHIM(int, fsync, "fsync", (int descriptor), (descriptor))
SHIM(int, fdatasync, "fsync", (int descriptor), (descriptor))
SHIM(ssize_t, write, "write", (int descriptor, const void *from, size_t size),
     (descriptor, from, size))
SHIM(ssize_t, pwrite, "write", (int descriptor, const void *from, size_t size, off_t at),
     (descriptor, from, size, at))
SHIM(ssize_t, pwrite64, "write", (int descriptor, const void *from, size_t size, off64_t at),
     (descriptor, from, size, at))
SHIM(ssize_t, pwritev, "write", (int descriptor, const struct iovec *from, int count, off_t at),
     (descriptor, from, count, at))
SHIM(ssize_t, pwritev64, "write", (int descriptor, const struct iovec *from, int count, off64_t at),
     (descriptor, from, count, at))
SHIM(ssize_t, pwritev2, "write",
     (int descriptor, const struct iovec *from, int count, off_t at, int flags),
     (descriptor, from, count, at, flags))
SHIM(ssize_t, pwritev64v2, "write",
     (int descriptor, const struct iovec *from, int count, off64_t at, int flags),
     (descriptor, from, count, at, flags))
SHIM(ssize_t, read, "read", (int descriptor, void *into, size_t size), (descriptor, into, size))
SHIM(ssize_t, pread, "read", (int descriptor, void *into, size_t size, off_t at),
     (descriptor, into, size, at))
SHIM(ssize_t, pread64, "read", (int descriptor, void *into, size_t size, off64_t at),
     (descriptor, into, size, at))
