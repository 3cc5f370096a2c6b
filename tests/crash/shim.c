/* Stands between a process and its C library, and makes one of the calls that touch one directory fail.
 *
 * Loaded with LD_PRELOAD; steered from inside the process through shim_watch(), shim_fail() and
 * shim_watch_end(), by ctypes. Outside the watched directory every call goes through untouched. Another thread than the one
 * that arms it may make the calls, or several may: they are counted one after the other.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* What happens to the chosen call. Known to shim.py by number. */
enum { NOTHING, REFUSED, SHORT, ZERO, TORN, SHORT_THEN_REFUSED, DONE_BUT_REPORTED_AS_FAILED };

static char watched[PATH_MAX];
static char log_text[1 << 16];
static size_t log_length;
static char target[32];
static int nth, how, error, for_ever, seen, refuse_next_write;

void shim_watch(const char *directory)
{
    snprintf(watched, sizeof watched, "%s", directory);
    log_length = 0;
    log_text[0] = 0;
    target[0] = 0;
    refuse_next_write = 0;
}

void shim_fail(const char *call, int number, int manner, int code, int all_after)
{
    snprintf(target, sizeof target, "%s", call);
    nth = number;
    how = manner;
    error = code;
    for_ever = all_after;
    seen = 0;
}

void shim_watch_end(void) { watched[0] = 0; }

const char *shim_log(void) { return log_text; }

static void *real(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        fprintf(stderr, "shim: the C library has no %s\n", name);
        _exit(120);
    }
    return found;
}
#define REAL(name) static __typeof__(&name) call_; if (!call_) call_ = real(#name)

static int of_descriptor(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static void of_name(int fd, const char *name, char *path)
{
    char base[PATH_MAX] = "";
    if (name[0] == '/')
        snprintf(path, PATH_MAX, "%s", name);
    else if (fd == AT_FDCWD ? getcwd(base, sizeof base) != NULL : of_descriptor(fd, base))
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
    else
        path[0] = 0;
}

/* As fate(), by one thread at a time. */
static int fate_of_one(const char *call, const char *path)
{
    size_t length = strlen(watched);
    if (!length || strncmp(path, watched, length) || (path[length] && path[length] != '/'))
        return NOTHING;
    int written = snprintf(log_text + log_length, sizeof log_text - log_length, "%s %s\n", call, path);
    if (log_length + written < sizeof log_text)
        log_length += written;
    if (refuse_next_write && !strcmp(call, "write")) {
        refuse_next_write = 0;
        return REFUSED;
    }
    if (strcmp(target, "*") && strcmp(target, call))
        return NOTHING;
    seen++;
    return seen == nth || (for_ever && seen > nth) ? how : NOTHING;
}

/* Note the call if it touches the watched directory, and say what is to happen to it. */
static int fate(const char *call, const char *path)
{
    static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&guard);
    int answer = fate_of_one(call, path);
    pthread_mutex_unlock(&guard);
    return answer;
}

static int fate_of_descriptor(const char *call, int fd)
{
    char path[PATH_MAX];
    int before = errno;
    int answer = watched[0] && of_descriptor(fd, path) ? fate(call, path) : NOTHING;
    errno = before;
    return answer;
}

static int fate_of_name(const char *call, int fd, const char *name)
{
    char path[PATH_MAX];
    if (!watched[0] || !name)
        return NOTHING;
    int before = errno;
    of_name(fd, name, path);
    int answer = fate(call, path);
    errno = before;
    return answer;
}

/* A call that returns int, -1 for failure. */
#define ANSWER(fate_, real_call) \
    do { \
        int fate__ = (fate_); \
        if (fate__ == DONE_BUT_REPORTED_AS_FAILED) \
            (void)(real_call); \
        if (fate__ != NOTHING) { \
            errno = error; \
            return -1; \
        } \
        return real_call; \
    } while (0)

#define MODE_ARGUMENT(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

int open(const char *name, int flags, ...)
{
    REAL(open);
    MODE_ARGUMENT(flags)
    ANSWER(fate_of_name("openat", AT_FDCWD, name), call_(name, flags, mode));
}

int open64(const char *name, int flags, ...)
{
    REAL(open64);
    MODE_ARGUMENT(flags)
    ANSWER(fate_of_name("openat", AT_FDCWD, name), call_(name, flags, mode));
}

int openat(int fd, const char *name, int flags, ...)
{
    REAL(openat);
    MODE_ARGUMENT(flags)
    ANSWER(fate_of_name("openat", fd, name), call_(fd, name, flags, mode));
}

int openat64(int fd, const char *name, int flags, ...)
{
    REAL(openat64);
    MODE_ARGUMENT(flags)
    ANSWER(fate_of_name("openat", fd, name), call_(fd, name, flags, mode));
}

/* A call that takes `size` bytes; real_call(num_bytes) makes it with the first so many of them. */
#define TAKES(fd, size, real_call) \
    do { \
        size_t half = (size) / 2 ? (size) / 2 : (size); \
        ssize_t done; \
        switch (fate_of_descriptor("write", fd)) { \
        case NOTHING: \
            return real_call(size); \
        case SHORT: \
            return real_call(half); \
        case SHORT_THEN_REFUSED: \
            refuse_next_write = 1; \
            return real_call(half); \
        case ZERO: \
            return 0; \
        case TORN: \
            done = real_call(half); \
            return done < 0 ? done : (ssize_t)(size); \
        case DONE_BUT_REPORTED_AS_FAILED: \
            real_call(size); \
        } \
        errno = error; \
        return -1; \
    } while (0)

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(write);
#define WRITE(num_bytes) call_(fd, data, num_bytes)
    TAKES(fd, size, WRITE);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    REAL(pwrite64);
#define PWRITE(num_bytes) call_(fd, data, num_bytes, offset)
    TAKES(fd, size, PWRITE);
}

int close(int fd)
{
    REAL(close);
    int fate_ = fate_of_descriptor("close", fd);
    int done = call_(fd); /* Linux closes the descriptor whatever it reports. */
    if (fate_ == NOTHING)
        return done;
    errno = error;
    return -1;
}

int fsync(int fd)
{
    REAL(fsync);
    ANSWER(fate_of_descriptor("fsync", fd), call_(fd));
}

int fdatasync(int fd)
{
    REAL(fdatasync);
    ANSWER(fate_of_descriptor("fdatasync", fd), call_(fd));
}

int flock(int fd, int operation)
{
    REAL(flock);
    ANSWER(fate_of_descriptor("flock", fd), call_(fd, operation));
}

int fstat64(int fd, struct stat64 *out)
{
    REAL(fstat64);
    ANSWER(fate_of_descriptor("fstat", fd), call_(fd, out));
}

int fstatat64(int fd, const char *restrict name, struct stat64 *restrict out, int flags)
{
    REAL(fstatat64);
    ANSWER(fate_of_name("stat", fd, name), call_(fd, name, out, flags));
}

int stat64(const char *restrict name, struct stat64 *restrict out)
{
    REAL(stat64);
    ANSWER(fate_of_name("stat", AT_FDCWD, name), call_(name, out));
}

int lstat64(const char *restrict name, struct stat64 *restrict out)
{
    REAL(lstat64);
    ANSWER(fate_of_name("stat", AT_FDCWD, name), call_(name, out));
}

int rename(const char *from, const char *to)
{
    REAL(rename);
    ANSWER(fate_of_name("rename", AT_FDCWD, to), call_(from, to));
}

int renameat(int from_fd, const char *from, int to_fd, const char *to)
{
    REAL(renameat);
    ANSWER(fate_of_name("rename", to_fd, to), call_(from_fd, from, to_fd, to));
}

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags)
{
    REAL(renameat2);
    ANSWER(fate_of_name("rename", to_fd, to), call_(from_fd, from, to_fd, to, flags));
}

int unlink(const char *name)
{
    REAL(unlink);
    ANSWER(fate_of_name("unlink", AT_FDCWD, name), call_(name));
}

int unlinkat(int fd, const char *name, int flags)
{
    REAL(unlinkat);
    ANSWER(fate_of_name("unlink", fd, name), call_(fd, name, flags));
}

DIR *opendir(const char *name)
{
    REAL(opendir);
    if (fate_of_name("opendir", AT_FDCWD, name) == NOTHING)
        return call_(name);
    errno = error;
    return NULL;
}

DIR *fdopendir(int fd)
{
    REAL(fdopendir);
    if (fate_of_descriptor("opendir", fd) == NOTHING)
        return call_(fd);
    errno = error;
    return NULL;
}

struct dirent64 *readdir64(DIR *stream)
{
    REAL(readdir64);
    if (fate_of_descriptor("readdir", dirfd(stream)) == NOTHING)
        return call_(stream);
    errno = error;
    return NULL;
}

int fcntl64(int fd, int command, ...)
{
    REAL(fcntl64);
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *); /* an int or a pointer: the register is the same */
    va_end(more);
    ANSWER(fate_of_descriptor("fcntl", fd), call_(fd, command, argument));
}
