/* A disk that fails: preloaded into a process, it counts the calls that change files below one folder, and at the n-th
 * kills the process or refuses the call. See tests/torture.py.
 *
 * torture_arm(folder, n, code, last): from now on, count; at call n to last, fail with errno `code`; 0: SIGKILL, and a
 * write is cut in half first. torture_count(): calls since then. Only calls with a path or an open file below `folder`.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char folder[4096];
static size_t length;
static atomic_long count;
static long first, last;
static int code;

void torture_arm(const char *path, long n, int error, long until) {
    length = strlen(strcpy(folder, path));
    first = n, code = error, last = until;
    atomic_store(&count, 0);
}

long torture_count(void) { return atomic_load(&count); }

static int inside(const char *path) { return length && path && !strncmp(path, folder, length); }

static int inside_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = length ? readlink(link, path, sizeof path - 1) : -1;
    if (n < 0) return 0;
    path[n] = 0;
    return inside(path);
}

/* Whether this call fails; does not return where the process is to be killed. */
static int fails(void) {
    long now = atomic_fetch_add(&count, 1) + 1;
    if (now < first || now > last) return 0;
    if (!code) raise(SIGKILL);
    errno = code;
    return 1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))
#define TWO_PATHS(name)                                                                                                \
    int name(const char *a, const char *b) {                                                                           \
        return (inside(a) || inside(b)) && fails() ? -1 : REAL(int, #name, const char *, const char *)(a, b);          \
    }
#define ONE_PATH(name)                                                                                                 \
    int name(const char *a) { return inside(a) && fails() ? -1 : REAL(int, #name, const char *)(a); }
#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, int) : 0;                                            \
        va_end(more);                                                                                                  \
        if (flags & (O_WRONLY | O_RDWR) && inside(path) && fails()) return -1;                                         \
        return REAL(int, #name, const char *, int, ...)(path, flags, mode);                                            \
    }

TWO_PATHS(rename)
TWO_PATHS(link)
ONE_PATH(unlink)
OPEN(open)
OPEN(open64)

int fsync(int fd) { return inside_fd(fd) && fails() ? -1 : REAL(int, "fsync", int)(fd); }

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = REAL(ssize_t, "write", int, const void *, size_t);
    if (inside_fd(fd)) {
        long next = atomic_load(&count) + 1;
        if (!code && next >= first && next <= last) real(fd, data, size / 2);
        if (fails()) return -1;
    }
    return real(fd, data, size);
}
