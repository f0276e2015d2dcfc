// An NVTX tool in one file: domain ranges as JSON lines, one object an event.
// NVTX_INJECTION64_PATH=<this library> NVTX_RECORD=<file, appended to> python ...
#define _GNU_SOURCE
#include <inttypes.h>
#include <nvtx3/nvToolsExt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct nvtxDomainRegistration_st {
  char* name;
};
struct nvtxStringRegistration_st {
  char* text;
};

static FILE* file;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const char* message(const nvtxEventAttributes_t* event) {
  if (event->messageType == NVTX_MESSAGE_TYPE_ASCII) return event->message.ascii;
  if (event->messageType == NVTX_MESSAGE_TYPE_REGISTERED) return event->message.registered->text;
  return "?";
}

static void write_payload(const nvtxEventAttributes_t* event) {
  switch (event->payloadType) {
    case NVTX_PAYLOAD_TYPE_INT64:
      fprintf(file, "%" PRId64, event->payload.llValue);
      break;
    case NVTX_PAYLOAD_TYPE_UNSIGNED_INT64:
      fprintf(file, "%" PRIu64, event->payload.ullValue);
      break;
    case NVTX_PAYLOAD_TYPE_DOUBLE:
      fprintf(file, "%.17g", event->payload.dValue);
      break;
    case NVTX_PAYLOAD_UNKNOWN:
      fputs("null", file);
      break;
    default:
      fputs("\"unsupported\"", file);
  }
}

// Names are written as they are: those of the project need no escapes.
static void record(const char* kind, nvtxDomainHandle_t domain,
                   const nvtxEventAttributes_t* event) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  pthread_mutex_lock(&lock);
  fprintf(file, "{\"event\": \"%s\", \"ns\": %lld, \"thread\": %ld, \"domain\": \"%s\"", kind,
          now.tv_sec * 1000000000ll + now.tv_nsec, syscall(SYS_gettid), domain->name);
  if (event) {
    fprintf(file, ", \"name\": \"%s\", \"color\": %u, \"payload\": ", message(event), event->color);
    write_payload(event);
  }
  fputs("}\n", file);
  fflush(file);
  pthread_mutex_unlock(&lock);
}

static nvtxDomainHandle_t NVTX_API create_domain(const char* name) {
  nvtxDomainHandle_t domain = malloc(sizeof *domain);
  domain->name = strdup(name);
  return domain;
}

static nvtxStringHandle_t NVTX_API register_string(nvtxDomainHandle_t domain, const char* text) {
  (void)domain;
  nvtxStringHandle_t string = malloc(sizeof *string);
  string->text = strdup(text);
  return string;
}

static int NVTX_API push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  record("push", domain, event);
  return 0;
}

static int NVTX_API pop(nvtxDomainHandle_t domain) {
  record("pop", domain, NULL);
  return 0;
}

__attribute__((visibility("default"))) int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get) {
  const NvtxExportTableCallbacks* callbacks = get(NVTX_ETID_CALLBACKS);
  const char* path = getenv("NVTX_RECORD");
  NvtxFunctionTable table;
  unsigned size;
  if (!callbacks || !path) return 0;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  if (size <= NVTX_CBID_CORE2_DomainRegisterStringA || (!file && !(file = fopen(path, "a"))))
    return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create_domain;
  *table[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)register_string;
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
  *table[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
  return 1;
}
