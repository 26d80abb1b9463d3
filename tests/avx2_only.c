/* For LD_PRELOAD: a process sees the processor as one with AVX2, without AVX-512, AVX-VNNI and AMX, at full speed; compiled with
   -DVNNI as one with AVX-512 VNNI and without VBMI, AVX-VNNI and AMX, such as Cascade Lake. On Intel's processors Linux lets CPUID
   fault (arch_prctl(2), ARCH_SET_CPUID), and the answers are given here. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <stdio.h>
#define ARCH_SET_CPUID 0x1012
static void allow(int on) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, on); }
static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned char *at = (unsigned char *)r[REG_RIP];
    if (at[0] != 0x0f || at[1] != 0xa2) { signal(SIGSEGV, SIG_DFL); return; }
    unsigned leaf = r[REG_RAX], sub = r[REG_RCX], a, b, c, d;
    allow(1);
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(sub));
    allow(0);
#ifdef VNNI
    if (leaf == 7 && sub == 0) {
        c &= ~((1u << 1) | (1u << 6) | (1u << 12) | (1u << 14));
        d &= ~((1u << 22) | (1u << 23) | (1u << 24) | (1u << 25));
    }
#else
    if (leaf == 7 && sub == 0) {
        b &= ~((1u << 16) | (1u << 17) | (1u << 21) | (1u << 26) | (1u << 27) | (1u << 28) | (1u << 30) | (1u << 31));
        c &= ~((1u << 1) | (1u << 6) | (1u << 11) | (1u << 12) | (1u << 14));
        d &= ~((1u << 2) | (1u << 3) | (1u << 8) | (1u << 22) | (1u << 23) | (1u << 24) | (1u << 25));
    }
#endif
    if (leaf == 7 && sub == 1) a &= ~((1u << 4) | (1u << 5) | (1u << 21) | (1u << 23));
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d, r[REG_RIP] += 2;
}
__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) perror("no CPUID faulting"), _exit(2);
}
