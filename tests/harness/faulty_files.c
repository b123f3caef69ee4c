/* Calls of libc about files that fail, wait, give less or kill the process, as a list of rules says (faulty_files.py).

A rule is a line `CALL PATH RANK FIRST TIMES ACTION VALUE`. It strikes the calls number FIRST to FIRST + TIMES - 1 among those
that match its CALL, PATH (a glob) and RANK (-1: any). Note: the calls are counted in a file that all processes of a run map,
so a fault that has struck is over for the next start, too. The first number in this file changes when the rules do. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MOST_RULES = 64, LONGEST = 512, MOST_LISTINGS = 64 };
struct rule { char call[16], path[LONGEST], action[16]; int rank; long first, times; double value; };
struct rules { long generation; int count; struct rule at[MOST_RULES]; };

static _Atomic(struct rules *) current; /* replaced whole and never freed: another thread may read it */
static _Atomic long *counts;            /* the generation, then the matches of each rule */
static char folder[PATH_MAX];
static int own_rank;
static struct { _Atomic(DIR *) listing; double younger; } stale[MOST_LISTINGS];

static int raw_open(const char *path, int flags) { return syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0644); }

static int file_of(const char *name, int flags) {
    char path[PATH_MAX + 16];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return raw_open(path, flags);
}

static struct rules *load(long generation) {
    static __thread char text[MOST_RULES * 640];
    struct rules *rules = calloc(1, sizeof *rules);
    rules->generation = generation;
    int file = file_of("rules", O_RDONLY);
    long size = file < 0 ? 0 : syscall(SYS_read, file, text, sizeof text - 1);
    if (file >= 0) syscall(SYS_close, file);
    text[size > 0 ? size : 0] = 0;
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line && rules->count < MOST_RULES; line = strtok_r(NULL, "\n", &rest)) {
        struct rule *r = &rules->at[rules->count];
        rules->count += sscanf(line, "%15s %511s %d %ld %ld %15s %lf", r->call, r->path, &r->rank, &r->first, &r->times,
                               r->action, &r->value) == 7;
    }
    return rules;
}

/* Called at the start of a process, and by a forked one once its environment is its own. */
void faulty_files_begin(const char *place) {
    snprintf(folder, sizeof folder, "%s", place);
    own_rank = atoi(getenv("RANK") ? getenv("RANK") : "0");
    int file = file_of("counts", O_RDWR);
    if (file < 0) return;
    void *mapped = mmap(NULL, (MOST_RULES + 1) * sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (mapped != MAP_FAILED) counts = mapped;
}

__attribute__((constructor)) static void begin(void) {
    if (getenv("FAULTY_FILES")) faulty_files_begin(getenv("FAULTY_FILES"));
}

static struct rules *rules_now(void) {
    if (!counts) return NULL;
    struct rules *rules = atomic_load(&current);
    long generation = atomic_load(&counts[0]);
    if (!rules || rules->generation != generation) atomic_store(&current, rules = load(generation));
    return rules;
}

static void path_of(int descriptor, char *path) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
}

static void absolute(int base, const char *name, char *path) {
    if (!name || !*name) path_of(base, path);
    else if (*name == '/') snprintf(path, PATH_MAX, "%s", name);
    else {
        if (base == AT_FDCWD) { if (syscall(SYS_getcwd, path, PATH_MAX) < 0) *path = 0; }
        else path_of(base, path);
        size_t length = strlen(path);
        snprintf(path + length, PATH_MAX - length, "/%s", name);
    }
}

static void note(const struct rule *r, const char *path) {
    char line[PATH_MAX + 128];
    int length = snprintf(line, sizeof line, "%d %s %s %s %g\n", own_rank, r->call, path, r->action, r->value);
    int file = file_of("log", O_WRONLY | O_CREAT | O_APPEND);
    if (file >= 0) { syscall(SYS_write, file, line, length); syscall(SYS_close, file); }
}

static void pass(double seconds) {
    struct timespec left = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    while (nanosleep(&left, &left) && errno == EINTR) {}
}

/* The rule that strikes this call, if one does. Delays and deaths happen here. */
static const struct rule *struck(const char *call, int base, const char *name) {
    struct rules *rules = rules_now();
    if (!rules) return NULL;
    char path[PATH_MAX] = "";
    const struct rule *found = NULL;
    int before = errno;
    for (int i = 0; i < rules->count && !found; i++) {
        const struct rule *r = &rules->at[i];
        if (strcmp(r->call, call) || (r->rank >= 0 && r->rank != own_rank)) continue;
        if (!*path) absolute(base, name, path);
        if (fnmatch(r->path, path, 0)) continue;
        long number = atomic_fetch_add(&counts[i + 1], 1);
        if (number >= r->first && number - r->first < r->times) found = r;
    }
    if (found) note(found, path);
    if (found && !strcmp(found->action, "kill")) { kill(getpid(), SIGKILL); pause(); }
    if (found && !strcmp(found->action, "delay")) { pass(found->value); found = NULL; }
    errno = before;
    return found;
}

static int is(const struct rule *r, const char *action) { return r && !strcmp(r->action, action); }
static int failed(const struct rule *r) { errno = (int)r->value; return -1; }
#define REAL(name) ({ static typeof(&name) real; if (!real) real = (typeof(&name))dlsym(RTLD_NEXT, #name); real; })

/* A call that changes names: it fails, or it is done and its answer is that it failed, as after an NFS retransmission. */
#define CHANGE(call, base, path, action) do { const struct rule *r = struck(call, base, path); \
    if (is(r, "fail")) return failed(r); \
    int result = action; return is(r, "twice") && !result ? failed(r) : result; } while (0)
int rename(const char *a, const char *b) { CHANGE("rename", AT_FDCWD, a, REAL(rename)(a, b)); }
int renameat(int f, const char *a, int t, const char *b) { CHANGE("rename", f, a, REAL(renameat)(f, a, t, b)); }
int unlink(const char *a) { CHANGE("unlink", AT_FDCWD, a, REAL(unlink)(a)); }
int unlinkat(int f, const char *a, int flags) { CHANGE("unlink", f, a, REAL(unlinkat)(f, a, flags)); }
int rmdir(const char *a) { CHANGE("unlink", AT_FDCWD, a, REAL(rmdir)(a)); }
int mkdir(const char *a, mode_t mode) { CHANGE("mkdir", AT_FDCWD, a, REAL(mkdir)(a, mode)); }
int mkdirat(int f, const char *a, mode_t mode) { CHANGE("mkdir", f, a, REAL(mkdirat)(f, a, mode)); }
int link(const char *a, const char *b) { CHANGE("link", AT_FDCWD, b, REAL(link)(a, b)); }
int linkat(int f, const char *a, int t, const char *b, int flags) { CHANGE("link", t, b, REAL(linkat)(f, a, t, b, flags)); }
int ftruncate(int d, off_t size) { CHANGE("truncate", d, NULL, REAL(ftruncate)(d, size)); }
int ftruncate64(int d, off64_t size) { return ftruncate(d, size); }

int close(int d) { /* closes, whatever it answers; only what was written is answered with a fault */
    int mode = counts ? fcntl(d, F_GETFL) : -1;
    const struct rule *r = mode < 0 || (mode & O_ACCMODE) == O_RDONLY ? NULL : struck("close", d, NULL);
    int result = REAL(close)(d);
    return r && !result ? failed(r) : result;
}

static int failed_fsync(int d, const struct rule *r) { /* after it, what was written may be gone */
    struct stat was;
    if (is(r, "lost") && !REAL(fstat)(d, &was) && S_ISREG(was.st_mode) && !REAL(ftruncate)(d, 0)) REAL(ftruncate)(d, was.st_size);
    return failed(r);
}
#define FSYNC(name) int name(int d) { const struct rule *r = struck("fsync", d, NULL); \
    return r ? failed_fsync(d, r) : REAL(name)(d); }
FSYNC(fsync)
FSYNC(fdatasync)

#define OPENED(name) int name(const char *path, int flags, ...) { va_list more; va_start(more, flags); \
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; va_end(more); \
    const struct rule *r = struck("open", AT_FDCWD, path); \
    return is(r, "fail") ? failed(r) : REAL(name)(path, flags, mode); }
#define OPENED_AT(name) int name(int base, const char *path, int flags, ...) { va_list more; va_start(more, flags); \
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; va_end(more); \
    const struct rule *r = struck("open", base, path); \
    return is(r, "fail") ? failed(r) : REAL(name)(base, path, flags, mode); }
OPENED(open)
OPENED(open64)
OPENED_AT(openat)
OPENED_AT(openat64)

/* Bytes: a short answer is half of what was asked for; of a vector of buffers, half of the first one. */
static size_t less(const struct rule *r, size_t size) { return is(r, "short") && size > 1 ? size / 2 : size; }
#define BYTES(call, d, size, action) do { const struct rule *r = struck(call, d, NULL); \
    if (is(r, "fail")) { return failed(r); } size = less(r, size); return action; } while (0)
ssize_t read(int d, void *to, size_t size) { BYTES("read", d, size, REAL(read)(d, to, size)); }
ssize_t pread(int d, void *to, size_t size, off_t at) { BYTES("read", d, size, REAL(pread)(d, to, size, at)); }
ssize_t pread64(int d, void *to, size_t size, off64_t at) { BYTES("read", d, size, REAL(pread64)(d, to, size, at)); }
ssize_t write(int d, const void *of, size_t size) { BYTES("write", d, size, REAL(write)(d, of, size)); }
ssize_t pwrite(int d, const void *of, size_t size, off_t at) { BYTES("write", d, size, REAL(pwrite)(d, of, size, at)); }
ssize_t pwrite64(int d, const void *of, size_t size, off64_t at) { BYTES("write", d, size, REAL(pwrite64)(d, of, size, at)); }
#define VECTOR(call, d, v, n, action) do { const struct rule *r = struck(call, d, NULL); \
    if (is(r, "fail")) { return failed(r); } \
    struct iovec half = {v->iov_base, less(r, v->iov_len)}; if (is(r, "short")) { v = &half; n = 1; } \
    return action; } while (0)
ssize_t readv(int d, const struct iovec *v, int n) { VECTOR("read", d, v, n, REAL(readv)(d, v, n)); }
ssize_t preadv(int d, const struct iovec *v, int n, off_t at) { VECTOR("read", d, v, n, REAL(preadv)(d, v, n, at)); }
ssize_t preadv64(int d, const struct iovec *v, int n, off64_t at) { VECTOR("read", d, v, n, REAL(preadv64)(d, v, n, at)); }
ssize_t preadv64v2(int d, const struct iovec *v, int n, off64_t at, int flags) { /* what Python's os.preadv calls */
    VECTOR("read", d, v, n, REAL(preadv64v2)(d, v, n, at, flags)); }

#define LOOK(base, path, action) do { const struct rule *r = struck("stat", base, path); \
    return is(r, "fail") ? failed(r) : action; } while (0)
int stat(const char *p, struct stat *s) { LOOK(AT_FDCWD, p, REAL(stat)(p, s)); }
int stat64(const char *p, struct stat64 *s) { LOOK(AT_FDCWD, p, REAL(stat64)(p, s)); }
int lstat(const char *p, struct stat *s) { LOOK(AT_FDCWD, p, REAL(lstat)(p, s)); }
int lstat64(const char *p, struct stat64 *s) { LOOK(AT_FDCWD, p, REAL(lstat64)(p, s)); }
int fstat(int d, struct stat *s) { LOOK(d, NULL, REAL(fstat)(d, s)); }
int fstat64(int d, struct stat64 *s) { LOOK(d, NULL, REAL(fstat64)(d, s)); }
int fstatat(int b, const char *p, struct stat *s, int f) { LOOK(b, p, REAL(fstatat)(b, p, s, f)); }
int fstatat64(int b, const char *p, struct stat64 *s, int f) { LOOK(b, p, REAL(fstatat64)(b, p, s, f)); }
int statx(int b, const char *p, int f, unsigned m, struct statx *s) { LOOK(b, p, REAL(statx)(b, p, f, m, s)); }
int access(const char *p, int mode) { LOOK(AT_FDCWD, p, REAL(access)(p, mode)); }

/* Listings: an old one lacks what is younger than so many seconds. */
static DIR *remembered(DIR *listing, const struct rule *r) {
    for (int i = 0; is(r, "stale") && listing && i < MOST_LISTINGS; i++) {
        DIR *none = NULL;
        if (!atomic_compare_exchange_strong(&stale[i].listing, &none, listing)) continue;
        stale[i].younger = r->value;
        break;
    }
    return listing;
}

static int hidden(DIR *listing, const char *name) {
    for (int i = 0; i < MOST_LISTINGS; i++) {
        struct stat found;
        struct timespec now;
        if (atomic_load(&stale[i].listing) != listing || !strcmp(name, ".") || !strcmp(name, "..")) continue;
        if (REAL(fstatat)(dirfd(listing), name, &found, AT_SYMLINK_NOFOLLOW)) return 0;
        clock_gettime(CLOCK_REALTIME, &now);
        return now.tv_sec - found.st_ctim.tv_sec + (now.tv_nsec - found.st_ctim.tv_nsec) / 1e9 < stale[i].younger;
    }
    return 0;
}

DIR *opendir(const char *path) {
    const struct rule *r = struck("list", AT_FDCWD, path);
    if (is(r, "fail")) { failed(r); return NULL; }
    return remembered(REAL(opendir)(path), r);
}
DIR *fdopendir(int d) {
    const struct rule *r = struck("list", d, NULL);
    if (is(r, "fail")) { failed(r); return NULL; }
    return remembered(REAL(fdopendir)(d), r);
}
int closedir(DIR *listing) {
    for (int i = 0; i < MOST_LISTINGS; i++) {
        DIR *mine = listing;
        atomic_compare_exchange_strong(&stale[i].listing, &mine, NULL);
    }
    return REAL(closedir)(listing);
}
#define NEXT(name, entry) struct entry *name(DIR *listing) { struct entry *found; \
    while ((found = REAL(name)(listing)) && hidden(listing, found->d_name)) {} return found; }
NEXT(readdir, dirent)
NEXT(readdir64, dirent64)
