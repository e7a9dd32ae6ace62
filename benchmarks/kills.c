/* Counts the calls by which a process changes files, and kills it at one of them. Preloaded: see kills.py.

   What is counted is what libc is asked for, by whichever library; not what goes to stdout and stderr, to pipes,
   sockets and devices. All processes of a command share one page and so one count; where it reaches `at`, the whole
   process group is killed: before the call, after it, or after half of its bytes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define ROOM 4096
#define TEXT 248
enum { BEFORE, AFTER, HALF };

static struct page {
    atomic_long calls;
    long at, how, group;
    struct { long bytes; char text[TEXT]; } log[ROOM];
} *page;

/* Count from now on in the page that this file holds. */
int attach(const char *path) {
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return -1;
    struct page *mapped = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED) return -1;
    page = mapped;
    return 0;
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("KILLS_PAGE"); /* of a process that a command has started */
    if (path && attach(path)) abort();
}

static void die(void) {
    kill(page->group ? -page->group : getpid(), SIGKILL);
    for (;;) pause();
}

/* The number of this call, 0 where it doesn't count. */
static long count(const char *call, const char *path, long bytes) {
    long n = atomic_fetch_add(&page->calls, 1) + 1;
    if (n <= ROOM) {
        page->log[n - 1].bytes = bytes;
        snprintf(page->log[n - 1].text, TEXT, "%s %s", call, path);
    }
    if (n == page->at && page->how == BEFORE) die();
    return n;
}

static long count_path(const char *call, const char *path) {
    if (!page || !path || (!strncmp(path, "/dev/", 5) && strncmp(path, "/dev/shm/", 9))) return 0;
    return count(call, path, 0);
}

static long count_file(const char *call, int fd, long bytes) {
    struct stat status;
    if (!page || fd <= 2 || fstat(fd, &status) || !(S_ISREG(status.st_mode) || S_ISDIR(status.st_mode))) return 0;
    char link[64], path[TEXT];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return count(call, path, bytes);
}

static void done(long n) {
    if (n && n == page->at && page->how == AFTER) die();
}

static int halved(long n) { return n && n == page->at && page->how == HALF; }

#define REAL(result, name, types) \
    static result(*real) types; \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

#define BY_PATH(name, path, types, values) \
    int name types { \
        REAL(int, name, types); \
        long n = count_path(#name, path); \
        int result = real values; \
        done(n); \
        return result; \
    }
#define BY_FILE(result_type, name, fd, bytes, types, values) \
    result_type name types { \
        REAL(result_type, name, types); \
        long n = count_file(#name, fd, bytes); \
        result_type result = real values; \
        done(n); \
        return result; \
    }
#define WRITING(name, types, values, half) \
    ssize_t name types { \
        REAL(ssize_t, name, types); \
        long n = count_file(#name, fd, size); \
        if (halved(n)) { (void)!real half; die(); } \
        ssize_t result = real values; \
        done(n); \
        return result; \
    }

WRITING(write, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, size / 2))
WRITING(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), (fd, data, size / 2, at))
WRITING(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), (fd, data, size / 2, at))
BY_FILE(ssize_t, writev, fd, 0, (int fd, const struct iovec *data, int parts), (fd, data, parts))
BY_FILE(ssize_t, pwritev, fd, 0, (int fd, const struct iovec *data, int parts, off_t at), (fd, data, parts, at))
BY_FILE(ssize_t, pwritev64, fd, 0, (int fd, const struct iovec *data, int parts, off64_t at), (fd, data, parts, at))
BY_FILE(ssize_t, pwritev2, fd, 0, (int fd, const struct iovec *data, int parts, off_t at, int flags),
        (fd, data, parts, at, flags))
BY_FILE(ssize_t, sendfile, out, 0, (int out, int in, off_t *at, size_t size), (out, in, at, size))
BY_FILE(ssize_t, sendfile64, out, 0, (int out, int in, off64_t *at, size_t size), (out, in, at, size))
BY_FILE(ssize_t, copy_file_range, out, 0, (int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags),
        (in, from, out, to, size, flags))
BY_FILE(int, ftruncate, fd, 0, (int fd, off_t size), (fd, size))
BY_FILE(int, ftruncate64, fd, 0, (int fd, off64_t size), (fd, size))
BY_FILE(int, fallocate, fd, 0, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
BY_FILE(int, fallocate64, fd, 0, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
BY_FILE(int, posix_fallocate, fd, 0, (int fd, off_t at, off_t size), (fd, at, size))
BY_FILE(int, posix_fallocate64, fd, 0, (int fd, off64_t at, off64_t size), (fd, at, size))
BY_FILE(int, fsync, fd, 0, (int fd), (fd))
BY_FILE(int, fdatasync, fd, 0, (int fd), (fd))
BY_FILE(int, fchmod, fd, 0, (int fd, mode_t mode), (fd, mode))
BY_PATH(truncate, path, (const char *path, off_t size), (path, size))
BY_PATH(truncate64, path, (const char *path, off64_t size), (path, size))
BY_PATH(chmod, path, (const char *path, mode_t mode), (path, mode))
BY_PATH(fchmodat, path, (int at, const char *path, mode_t mode, int flags), (at, path, mode, flags))
BY_PATH(link, to, (const char *from, const char *to), (from, to))
BY_PATH(linkat, to, (int in, const char *from, int at, const char *to, int flags), (in, from, at, to, flags))
BY_PATH(symlink, to, (const char *from, const char *to), (from, to))
BY_PATH(symlinkat, to, (const char *from, int at, const char *to), (from, at, to))
BY_PATH(rename, to, (const char *from, const char *to), (from, to))
BY_PATH(renameat, to, (int in, const char *from, int at, const char *to), (in, from, at, to))
BY_PATH(renameat2, to, (int in, const char *from, int at, const char *to, unsigned flags), (in, from, at, to, flags))
BY_PATH(unlink, path, (const char *path), (path))
BY_PATH(unlinkat, path, (int at, const char *path, int flags), (at, path, flags))
BY_PATH(remove, path, (const char *path), (path))
BY_PATH(mkdir, path, (const char *path, mode_t mode), (path, mode))
BY_PATH(mkdirat, path, (int at, const char *path, mode_t mode), (at, path, mode))
BY_PATH(rmdir, path, (const char *path), (path))

#define MAKES(flags) ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE)
#define OPENING(name, types, values) \
    int name types { \
        REAL(int, name, types); \
        mode_t mode = 0; \
        if (MAKES(flags)) { \
            va_list more; \
            va_start(more, flags); \
            mode = va_arg(more, mode_t); \
            va_end(more); \
        } \
        long n = MAKES(flags) || flags & O_TRUNC ? count_path(#name, path) : 0; \
        int result = real values; \
        done(n); \
        return result; \
    }
OPENING(open, (const char *path, int flags, ...), (path, flags, mode))
OPENING(open64, (const char *path, int flags, ...), (path, flags, mode))
OPENING(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPENING(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))

#define STREAM(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, name, (const char *, const char *)); \
        long n = mode && strpbrk(mode, "wa") ? count_path(#name, path) : 0; \
        FILE *result = real(path, mode); \
        done(n); \
        return result; \
    }
STREAM(fopen)
STREAM(fopen64)
